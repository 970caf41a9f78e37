"""Bodies of Anthropic's endpoints. `anthropic_input.py` checks blocks, tools and `tool_choice`
while it converts them. `nanovllm/api/fields.py` lists the refused fields."""

from __future__ import annotations

from typing import Literal

import msgspec

from nanovllm.api.schemas import Json


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """type: turns reasoning on or off if the chat template has such a switch; "adaptive" leaves it
    to the template. budget_tokens: no effect. display: "omitted" removes the reasoning from the
    response."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: Json


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """format: what the output must match. effort: passed to chat templates that use it."""

    format: OutputFormat | None = None
    effort: str | None = None


class RequestMetadata(msgspec.Struct, kw_only=True):
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
    metadata: RequestMetadata | None = None
