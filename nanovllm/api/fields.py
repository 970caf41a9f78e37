"""Known request fields that are refused, each with its reason. All other known fields work."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import msgspec

from nanovllm.api import anthropic_bodies, bodies
from nanovllm.api.errors import ApiError, refused

Body = TypeVar("Body", bound=msgspec.Struct)


class Refusal(NamedTuple):
    """allowed: values without effect, accepted like null."""

    reason: str
    allowed: tuple[Any, ...] = ()


MAX_DEPTH = 512  # of a body: writing it again needs as much stack as reading it
MAX_CONTAINERS = 1 << 18  # lists and objects of a body: each takes 20 times the memory of its text
NO_FILES = "requests cannot supply code, templates or adapters"
NOT_BUILT = "it is not implemented"
STATEFUL = "the server keeps no state between requests"
REFUSED_SAMPLING: dict[str, Refusal] = {
    "best_of": Refusal("use n", (1,)),
    "use_beam_search": Refusal("beam search is only available offline", (False,)),
    "length_penalty": Refusal("beam search is only available offline", (1, 1.0)),
    "early_stopping": Refusal("beam search is only available offline", (False,)),
    "logits_processors": Refusal(NO_FILES),
    "mm_processor_kwargs": Refusal(NOT_BUILT),
    "kv_transfer_params": Refusal(NOT_BUILT),
    "vllm_xargs": Refusal(NOT_BUILT),
    "guided_decoding_backend": Refusal("there is one backend"),
    "structural_tag": Refusal(NOT_BUILT),
    "thinking_token_budget": Refusal(NOT_BUILT),
}
REFUSED_CHAT: dict[str, Refusal] = {
    "add_special_tokens": Refusal("the chat template adds them", (False,)),
    "audio": Refusal("answers are text"),
    "modalities": Refusal("answers are text", (["text"],)),
    "function_call": Refusal("use tool_choice"),
    "functions": Refusal("use tools"),
    "moderation": Refusal(NOT_BUILT),
    "prediction": Refusal(NOT_BUILT),
    "prompt_cache_options": Refusal("the cache has no per-request options"),
    "prompt_cache_retention": Refusal("the cache is in memory", ("in_memory",)),
    "service_tier": Refusal("there is one tier", ("auto", "default")),
    "verbosity": Refusal("models have no such setting", ("medium",)),
    "web_search_options": Refusal("the server cannot search the web"),
    "chat_template": Refusal(NO_FILES),
    "documents": Refusal("use chat_template_kwargs"),
    "echo": Refusal("use /v1/completions", (False,)),
}
REFUSED_RESPONSES: dict[str, Refusal] = {
    "access_programs": Refusal(NOT_BUILT),
    "background": Refusal(STATEFUL, (False,)),
    "background_options": Refusal(STATEFUL),
    "context_management": Refusal(STATEFUL),
    "conversation": Refusal(STATEFUL),
    "image": Refusal("answers are text"),
    "include": Refusal(NOT_BUILT, ([],)),
    "max_tool_calls": Refusal("the server runs no tools"),
    "moderation": Refusal(NOT_BUILT),
    "previous_response_id": Refusal(STATEFUL),
    "prompt": Refusal(STATEFUL),
    "prompt_cache_options": Refusal("the cache has no per-request options"),
    "prompt_cache_retention": Refusal("the cache is in memory", ("in_memory",)),
    "service_tier": Refusal("there is one tier", ("auto", "default")),
    "stream_options": Refusal(
        "usage is always in the last event", ({}, {"include_obfuscation": False})
    ),
    "top_logprobs": Refusal("use /v1/chat/completions", (0,)),
    "truncation": Refusal("inputs that are too long are refused", ("disabled",)),
}
REFUSED_COUNT_TOKENS: dict[str, Refusal] = {
    "mcp_servers": Refusal("the server connects to no MCP servers", ([],)),
    "output_format": Refusal("use output_config"),
    "speed": Refusal("there is one speed", ("standard",)),
}
REFUSED_MESSAGES: dict[str, Refusal] = REFUSED_COUNT_TOKENS | {
    "container": Refusal("the server runs no tools"),
    "diagnostics": Refusal(STATEFUL),
    "inference_geo": Refusal(NOT_BUILT),
    "service_tier": Refusal("there is one tier", ("auto", "standard_only")),
}
REFUSED: dict[type[msgspec.Struct], Mapping[str, Refusal]] = {
    bodies.CompletionBody: REFUSED_SAMPLING
    | {"suffix": Refusal(NOT_BUILT, ("",)), "metadata": Refusal(STATEFUL, ({},))},
    bodies.ChatBody: REFUSED_SAMPLING | REFUSED_CHAT,
    bodies.ResponsesBody: REFUSED_RESPONSES,
    bodies.InputTokensBody: REFUSED_RESPONSES,
    anthropic_bodies.MessagesBody: REFUSED_MESSAGES,
    anthropic_bodies.CountTokensBody: REFUSED_COUNT_TOKENS,
    bodies.EmbeddingBody: {},
    bodies.TokenizeBody: {"chat_template": Refusal(NO_FILES)},
    bodies.DetokenizeBody: {},
}
# msgspec appends the place to its messages: "Expected `int`, got `str` - at `$.n`"
PLACE = re.compile(r"(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?", re.DOTALL)
# the closing quote is optional, so that no quote starts a match twice: the time is linear
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
MISSING = re.compile(r"Object missing required field `(\w+)`")


def decoded(data: bytes, kind: type[Body]) -> Body:
    """The parsed body of a request. Raises ApiError, with the field, for an invalid one."""
    num = data.count(b"[") + data.count(b"{")
    if num > MAX_CONTAINERS and _num_containers(data) > MAX_CONTAINERS:
        words = f"the body has more than {MAX_CONTAINERS} lists and objects"
        raise ApiError(400, words, code="invalid_json")
    try:
        found = msgspec.json.decode(data)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    if num > MAX_DEPTH and _is_deeper(found, MAX_DEPTH):
        raise _too_deep()
    check_names(found, kind)
    _make_whole(found, kind)
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None


def _num_containers(data: bytes) -> int:
    """The number of lists and objects in a JSON text: brackets outside of strings."""
    bare = STRING.sub(b"", data)
    return bare.count(b"[") + bare.count(b"{")


def _too_deep() -> ApiError:
    words = f"the body is nested too deeply: at most {MAX_DEPTH} levels are allowed"
    return ApiError(400, words, code="invalid_json")


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` levels deep."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for one in level
            for inner in (one.values() if type(one) is dict else one)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def check_names(found: Mapping[str, Any], kind: type[msgspec.Struct]) -> None:
    """Raises ApiError for unsupported fields, unless their values have no effect."""
    works = kind.__struct_fields__
    for name, value in found.items():
        if name in works:
            continue
        refusal = REFUSED[kind].get(name)
        if refusal is None:
            near = difflib.get_close_matches(name[:64], [*works, *REFUSED[kind]], n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise refused(name[:64], f"there is no field {name[:64]!r}{hint}")
        if value is not None and not _is_in(value, refusal.allowed):
            allowed = "".join(f" or {msgspec.json.encode(one).decode()}" for one in refusal.allowed)
            raise refused(
                name, f"{name} is not supported ({refusal.reason}): leave it out{allowed}"
            )


def _make_whole(found: dict[str, Any], kind: type[msgspec.Struct]) -> None:
    """Turn 4.0 into 4 in whole-number fields: JSON does not distinguish them, and clients in
    languages with one number type send either."""
    for name in _whole_numbers(kind) & found.keys():
        value = found[name]
        if type(value) is float and value.is_integer():
            found[name] = int(value)


@functools.cache
def _whole_numbers(kind: type[msgspec.Struct]) -> frozenset[str]:
    """The whole-number fields of a body."""
    hints = get_type_hints(kind)
    return frozenset(name for name, hint in hints.items() if int in (hint, *get_args(hint)))


def _is_in(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)


def _misfit(text: str) -> ApiError:
    """The error for a value of a wrong type, from msgspec's message."""
    match = PLACE.fullmatch(text)
    words, place = (match[1], match[2] or "") if match else (text, "")
    missing = MISSING.match(words)
    if missing:
        place = f"{place}.{missing[1]}" if place else missing[1]
        return ApiError(400, f"{place} is missing", param=place, code="missing_required_parameter")
    return ApiError(400, f"{place or 'body'}: {words}", param=place or None, code="invalid_type")
