"""Every field of OpenAI's API, of vLLM's and of Anthropic's: the content of docs/api_fields.md.

    python -m tests.api.fields        # writes the file

Each field of the official clients' types is sent to a server (test_api_fields.py). One that works
changes what the engine gets or what the client reads, which `Case.shows` looks for. The others are
refused with their name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from anthropic.types import message_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from nanovllm.api.anthropic_schemas import MessagesBody
from nanovllm.api.fields import REFUSED, RefusedField
from nanovllm.api.schemas import ChatBody, CompletionBody, ResponsesBody
from nanovllm.prompts import Prompt
from nanovllm.sampling import SamplingParams

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api_fields.md"
ENDPOINTS: dict[str, type[msgspec.Struct]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}]
OWN_TOOLS = [{"type": "function", "name": "look_up", "parameters": SCHEMA}]  # of responses
USER: Any = [{"role": "user", "content": "Hi"}]


class Seen(NamedTuple):
    """What a request has led to. answer: the JSON, or the events of a stream. log: its line."""

    params: SamplingParams
    prompt: Prompt
    priority: int
    answer: Any
    log: dict[str, Any]


class Case(NamedTuple):
    """How a field is shown to work. value: what is sent. others: fields that it needs."""

    value: Any
    shows: Callable[[Seen], object]
    others: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    remark: str = ""


def _passed(name: str, value: Any, as_: Any = None) -> Case:
    """A field that the engine gets as it is."""
    expected = value if as_ is None else as_
    return Case(value, lambda seen: getattr(seen.params, name) == expected)


def _form(name: str, value: Any) -> Callable[[Seen], object]:
    return lambda seen: getattr(seen.params.structured_outputs, name) == value


def _choice(seen: Seen) -> Any:
    return seen.answer["choices"][0]


BOTH: dict[str, Case] = {
    "model": Case("tiny-qwen3", lambda seen: seen.answer["model"] == "tiny-qwen3"),
    "temperature": _passed("temperature", 0.5),
    "top_p": _passed("top_p", 0.5),
    "n": Case(3, lambda seen: len(seen.answer["choices"]) == 3),
    "stop": _passed("stop", ["one", "two"], ("one", "two")),
    "seed": _passed("seed", 19),
    "stream": Case(True, lambda seen: seen.answer[-1] == "[DONE]"),
    "stream_options": Case(
        {"include_usage": True}, lambda seen: seen.answer[-2]["usage"], {"stream": True},
        "`include_usage`, and vLLM's `continuous_usage_stats`",
    ),
    "max_tokens": _passed("max_tokens", 7),
    "presence_penalty": _passed("presence_penalty", 0.5),
    "frequency_penalty": _passed("frequency_penalty", 0.5),
    "logit_bias": _passed("logit_bias", {"19": 3.0}, {19: 3.0}),
    "user": Case("somebody", lambda seen: seen.log["user"] == "somebody",
                 remark="is in the access log"),
    "top_k": _passed("top_k", 3),
    "min_p": _passed("min_p", 0.1),
    "repetition_penalty": _passed("repetition_penalty", 1.1),
    "min_tokens": _passed("min_tokens", 3),
    "stop_token_ids": _passed("stop_token_ids", [19], (19,)),
    "ignore_eos": _passed("ignore_eos", True),
    "include_stop_str_in_output": _passed("include_stop_str_in_output", True),
    "skip_special_tokens": _passed("skip_special_tokens", False),
    "spaces_between_special_tokens": _passed("spaces_between_special_tokens", False),
    "truncate_prompt_tokens": _passed("truncate_prompt_tokens", 3),
    "prompt_logprobs": _passed("prompt_logprobs", 1),
    "allowed_token_ids": _passed("allowed_token_ids", [19, 99], (19, 99)),
    "bad_words": _passed("bad_words", ["no"], ("no",)),
    "priority": Case(3, lambda seen: seen.priority == 3),
    "request_id": Case("mine-19", lambda seen: seen.answer["id"].endswith("-mine-19")),
    "cache_salt": Case("salt", lambda seen: seen.prompt.cache_salt == "salt"),
    "return_token_ids": Case(True, lambda seen: len(_choice(seen)["token_ids"]) == 3),
    "response_format": Case(
        {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        _form("json", SCHEMA), remark="`text`, `json_object`, `json_schema`",
    ),
    "structured_outputs": Case({"regex": "a+"}, _form("regex", "a+")),
    "disable_spec_decode": _passed("disable_spec_decode", True),
    "guided_json": Case(SCHEMA, _form("json", SCHEMA)),
    "guided_regex": Case("a+", _form("regex", "a+")),
    "guided_choice": Case(["yes", "no"], _form("choice", ("yes", "no"))),
    "guided_grammar": Case("start: /a+/", _form("grammar", "start: /a+/")),
    "guided_whitespace_pattern": Case(
        " ?", _form("whitespace_pattern", " ?"), {"guided_json": SCHEMA}
    ),
}  # fmt: skip
COMPLETIONS: dict[str, Case] = BOTH | {
    "prompt": Case(
        "hello", lambda seen: seen.prompt.text == "hello",
        remark="a text, token ids, or a list of either",
    ),
    "echo": Case(True, lambda seen: _choice(seen)["text"].startswith("hello")),
    "logprobs": Case(2, lambda seen: len(_choice(seen)["logprobs"]["top_logprobs"][0]) == 2),
    "return_tokens_as_token_ids": Case(
        True, lambda seen: _choice(seen)["logprobs"]["tokens"][0].startswith("token_id:"),
        {"logprobs": 1},
    ),
    "add_special_tokens": Case(False, lambda seen: seen.prompt.token_ids is not None),
}  # fmt: skip
CHAT: dict[str, Case] = BOTH | {
    "messages": Case(
        USER, lambda seen: "Hi" in (seen.prompt.text or ""),
        remark="parts: text, and images, video and sound where the model has them",
    ),
    "max_completion_tokens": _passed("max_tokens", 7),
    "logprobs": Case(True, lambda seen: len(_choice(seen)["logprobs"]["content"]) == 3),
    "top_logprobs": Case(
        2, lambda seen: len(_choice(seen)["logprobs"]["content"][0]["top_logprobs"]) == 2,
        {"logprobs": True},
    ),
    "return_tokens_as_token_ids": Case(
        True, lambda seen: _choice(seen)["logprobs"]["content"][0]["token"].startswith("token_id:"),
        {"logprobs": True},
    ),
    "tools": Case(
        TOOLS, lambda seen: "look_up" in str(seen.params.structured_outputs),
        {"tool_choice": "required"}, "functions; see [tools.md](tools.md)",
    ),
    "tool_choice": Case(
        {"type": "function", "function": {"name": "look_up"}},
        lambda seen: "look_up" in str(seen.params.structured_outputs), {"tools": TOOLS},
        "`none`, `auto`, `required` or a named function",
    ),
    "parallel_tool_calls": Case(
        False, lambda seen: "'maxItems': 1" in str(seen.params.structured_outputs),
        {"tools": TOOLS, "tool_choice": "required"},
    ),
    "safety_identifier": Case("somebody", lambda seen: seen.log["user"] == "somebody",
                              remark="is in the access log"),
    "prompt_cache_key": Case("k", lambda seen: seen.answer["usage"],
                             remark="requests of one API key share one prefix cache"),
    "metadata": Case({"a": "b"}, lambda seen: seen.answer["usage"],
                     remark="has no effect: nothing is stored"),
    "store": Case(True, lambda seen: seen.answer["usage"],
                  remark="has no effect: nothing is stored"),
    "include_reasoning": Case(False, lambda seen: "reasoning" not in str(_choice(seen))),
    "add_generation_prompt": Case(
        False, lambda seen: not (seen.prompt.text or "").endswith("assistant\n")
    ),
    "continue_final_message": Case(
        True, lambda seen: (seen.prompt.text or "").endswith("I am"),
        {"messages": [*USER, {"role": "assistant", "content": "I am"}]},
    ),
}  # fmt: skip
CHAT |= {
    "chat_template_kwargs": Case(
        {"enable_thinking": False}, lambda seen: (seen.prompt.text or "").endswith("</think>"),
        remark="variables that the chat template reads; others are left out",
    ),
    "reasoning_effort": Case(
        "low", lambda seen: "low" in (seen.prompt.text or ""),
        remark="where the chat template reads it; `none` sets `enable_thinking` to false, others "
               "to true, unless `chat_template_kwargs` has it",
    ),
}  # fmt: skip
RESPONSES: dict[str, Case] = {
    "input": Case(
        [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        lambda seen: "Hi" in (seen.prompt.text or ""),
        remark="a text, or messages, reasoning, calls of functions and what they gave",
    ),
    "instructions": Case("Be brief.", lambda seen: "Be brief." in (seen.prompt.text or "")),
    "max_output_tokens": _passed("max_tokens", 7),
    "temperature": BOTH["temperature"],
    "top_p": BOTH["top_p"],
    "model": BOTH["model"],
    "user": BOTH["user"],
    "stream": Case(True, lambda seen: seen.answer[-1]["type"] == "response.incomplete"),
    "text": Case(
        {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}, _form("json", SCHEMA)
    ),
    "metadata": Case({"a": "b"}, lambda seen: seen.answer["metadata"] == {"a": "b"},
                     remark="is in the answer"),
    "store": Case(True, lambda seen: seen.answer["store"] is False,
                  remark="nothing is stored, and the answer says `false`"),
    "tools": Case(
        OWN_TOOLS, lambda seen: "look_up" in str(seen.params.structured_outputs),
        {"tool_choice": "required"}, "functions; see [tools.md](tools.md)",
    ),
    "tool_choice": Case(
        {"type": "function", "name": "look_up"},
        lambda seen: "look_up" in str(seen.params.structured_outputs), {"tools": OWN_TOOLS},
        "`none`, `auto`, `required` or a named function",
    ),
    "parallel_tool_calls": Case(
        False, lambda seen: "'maxItems': 1" in str(seen.params.structured_outputs),
        {"tools": OWN_TOOLS, "tool_choice": "required"},
    ),
    "reasoning": Case(
        {"effort": "low", "summary": None}, lambda seen: "low" in (seen.prompt.text or ""),
        remark="`effort`, as `reasoning_effort` of chat",
    ),
    "safety_identifier": CHAT["safety_identifier"],
    "prompt_cache_key": CHAT["prompt_cache_key"],
}  # fmt: skip
THEIR_TOOLS = [{"name": "look_up", "input_schema": SCHEMA}]  # of Anthropic
MESSAGES: dict[str, Case] = {
    "messages": Case(
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        lambda seen: "Hi" in (seen.prompt.text or ""),
        remark="blocks: `text`, `image` where the model has them, `thinking`, `tool_use`, "
               "`tool_result`; the last message may be the beginning of the answer",
    ),
    "system": Case("Be brief.", lambda seen: "Be brief." in (seen.prompt.text or "")),
    "max_tokens": _passed("max_tokens", 7),
    "stop_sequences": Case(["one", "two"], lambda seen: seen.params.stop == ("one", "two")),
    "stream": Case(True, lambda seen: seen.answer[-1]["type"] == "message_stop"),
    "tools": Case(
        THEIR_TOOLS, lambda seen: "look_up" in str(seen.params.structured_outputs),
        {"tool_choice": {"type": "any"}}, "with `input_schema`; the server runs none itself",
    ),
    "tool_choice": Case(
        {"type": "tool", "name": "look_up", "disable_parallel_tool_use": True},
        lambda seen: "'maxItems': 1" in str(seen.params.structured_outputs),
        {"tools": THEIR_TOOLS}, "`auto`, `any`, `tool`, `none`",
    ),
    "thinking": Case(
        {"type": "disabled"}, lambda seen: (seen.prompt.text or "").endswith("</think>"),
        remark="`enabled` and `disabled`, where the chat template reads `enable_thinking`; "
               "`budget_tokens` has no effect",
    ),
    "output_config": Case(
        {"format": {"type": "json_schema", "schema": SCHEMA}}, _form("json", SCHEMA),
        remark="`format`, and `effort` where the chat template reads `reasoning_effort`",
    ),
    "metadata": Case({"user_id": "somebody"}, lambda seen: seen.log["user"] == "somebody",
                     remark="`user_id` is in the access log"),
    "cache_control": Case({"type": "ephemeral"}, lambda seen: seen.answer["usage"],
                          remark="has no effect: requests of one API key share one prefix cache"),
    "context_management": Case(
        {"edits": []}, lambda seen: seen.answer["usage"],
        remark="has no effect: a conversation that is too long is refused",
    ),
    **{name: BOTH[name] for name in ("model", "temperature", "top_p", "top_k")},
}  # fmt: skip
CASES = {
    "/v1/completions": COMPLETIONS, "/v1/chat/completions": CHAT, "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
}  # fmt: skip
# fields of a call of the client that are headers of the request
HEADERS = ("user_profile_id", "workspace_id")
OFFICIAL = {
    "/v1/completions": completion_create_params.CompletionCreateParamsBase.__annotations__,
    "/v1/chat/completions": chat_params.CompletionCreateParamsBase.__annotations__,
    "/v1/responses": response_create_params.ResponseCreateParamsBase.__annotations__,
    "/v1/messages": [
        name for name in message_create_params.MessageCreateParamsBase.__annotations__
        if name not in HEADERS
    ],
}  # fmt: skip


def names(endpoint: str) -> list[str]:
    """All known fields: those of the official client, then the others."""
    ours = [*ENDPOINTS[endpoint].__struct_fields__, *REFUSED[ENDPOINTS[endpoint]]]
    own = ["stream", *OFFICIAL[endpoint]]
    return sorted(own) + sorted(set(ours) - set(own))


def refusals(endpoint: str) -> dict[str, RefusedField]:
    return dict(REFUSED[ENDPOINTS[endpoint]])


def page() -> str:
    """The text of the page."""
    lines = [
        "# Fields of requests", "",
        "`python -m tests.api.fields` writes this page; `tests/api/test_api_fields.py` sends every",
        "field to a server. A field works, or the request is refused with status 400 and the",
        "field's name in `param` (`/v1/messages`: in the message). Fields that are not in the",
        "table are also refused. `null` is always accepted. Unknown fields of messages and their",
        "parts are ignored.",
    ]  # fmt: skip
    for endpoint in ENDPOINTS:
        lines += ["", f"## {endpoint}", "", "| field | of | |", "|---|---|---|"]
        lines += [_row(endpoint, name) for name in names(endpoint)]
    return "\n".join([*lines, ""])


def _row(endpoint: str, name: str) -> str:
    owner = "OpenAI" if name == "stream" or name in OFFICIAL[endpoint] else "vLLM"
    if endpoint == "/v1/messages":
        owner = "Anthropic"
    refusal = refusals(endpoint).get(name)
    if refusal is None:
        remark = CASES[endpoint][name].remark
        return f"| `{name}` | {owner} | works{f': {remark}' if remark else ''} |"
    taken = " or ".join(f"`{json.dumps(one)}`" for one in refusal.allowed)
    taken = f"; {taken} is accepted" if taken else ""
    return f"| `{name}` | {owner} | refused: {refusal.reason}{taken} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
