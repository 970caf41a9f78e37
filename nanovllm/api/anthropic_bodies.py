"""The bodies of Anthropic's endpoints. Blocks, tools and `tool_choice` are checked where they are
converted (`anthropic_input.py`). `nanovllm/api/fields.py` has the fields that are refused."""

from __future__ import annotations

from typing import Literal

import msgspec

from nanovllm.api.bodies import Json


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """type: whether the model reasons first, if its chat template lets requests choose; "adaptive"
    leaves it to the template. budget_tokens: has no effect. display: "omitted" leaves the reasoning
    out of the answer."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: Json


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """format: what the answer must match. effort: for chat templates that read it."""

    format: OutputFormat | None = None
    effort: str | None = None


class Metadata(msgspec.Struct, kw_only=True):
    user_id: str | None = None


class CountTokensBody(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens."""

    messages: list[Json]
    model: str | None = None
    system: str | list[Json] | None = None
    tools: list[Json] | None = None
    tool_choice: Json | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Json | None = None
    context_management: Json | None = None


class MessagesBody(CountTokensBody, kw_only=True):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
