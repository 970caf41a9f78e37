"""Known request fields that are refused, each with its reason. All other known fields work."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import msgspec

from nanovllm.api import anthropic_schemas, pooling_schemas, schemas
from nanovllm.api.errors import ApiError, refused

Body = TypeVar("Body", bound=msgspec.Struct)


class RefusedField(NamedTuple):
    """allowed: values without effect, accepted like null."""

    reason: str
    allowed: tuple[Any, ...] = ()


MAX_DEPTH = 512  # of a body: writing it again needs as much stack as reading it
MAX_CONTAINERS = 1 << 18  # lists and objects of a body: each takes 20 times the memory of its text
NO_FILES = "requests cannot supply code, templates or adapters"
NOT_BUILT = "it is not implemented"
STATEFUL = "the server keeps no state between requests"
REFUSED_SAMPLING: dict[str, RefusedField] = {
    "best_of": RefusedField("use n", (1,)),
    "use_beam_search": RefusedField("beam search is only available offline", (False,)),
    "length_penalty": RefusedField("beam search is only available offline", (1, 1.0)),
    "early_stopping": RefusedField("beam search is only available offline", (False,)),
    "logits_processors": RefusedField(NO_FILES),
    "mm_processor_kwargs": RefusedField(NOT_BUILT),
    "kv_transfer_params": RefusedField(NOT_BUILT),
    "vllm_xargs": RefusedField(NOT_BUILT),
    "guided_decoding_backend": RefusedField("there is one backend"),
    "structural_tag": RefusedField(NOT_BUILT),
    "thinking_token_budget": RefusedField(NOT_BUILT),
}
REFUSED_CHAT: dict[str, RefusedField] = {
    "add_special_tokens": RefusedField("the chat template adds them", (False,)),
    "audio": RefusedField("answers are text"),
    "modalities": RefusedField("answers are text", (["text"],)),
    "function_call": RefusedField("use tool_choice"),
    "functions": RefusedField("use tools"),
    "moderation": RefusedField(NOT_BUILT),
    "prediction": RefusedField(NOT_BUILT),
    "prompt_cache_options": RefusedField("the cache has no per-request options"),
    "prompt_cache_retention": RefusedField("the cache is in memory", ("in_memory",)),
    "service_tier": RefusedField("there is one tier", ("auto", "default")),
    "verbosity": RefusedField("models have no such setting", ("medium",)),
    "web_search_options": RefusedField("the server cannot search the web"),
    "chat_template": RefusedField(NO_FILES),
    "documents": RefusedField("use chat_template_kwargs"),
    "echo": RefusedField("use /v1/completions", (False,)),
}
REFUSED_RESPONSES: dict[str, RefusedField] = {
    "access_programs": RefusedField(NOT_BUILT),
    "background": RefusedField(STATEFUL, (False,)),
    "background_options": RefusedField(STATEFUL),
    "context_management": RefusedField(STATEFUL),
    "conversation": RefusedField(STATEFUL),
    "image": RefusedField("answers are text"),
    "include": RefusedField(NOT_BUILT, ([],)),
    "max_tool_calls": RefusedField("the server runs no tools"),
    "moderation": RefusedField(NOT_BUILT),
    "previous_response_id": RefusedField(STATEFUL),
    "prompt": RefusedField(STATEFUL),
    "prompt_cache_options": RefusedField("the cache has no per-request options"),
    "prompt_cache_retention": RefusedField("the cache is in memory", ("in_memory",)),
    "service_tier": RefusedField("there is one tier", ("auto", "default")),
    "stream_options": RefusedField(
        "usage is always in the last event", ({}, {"include_obfuscation": False})
    ),
    "top_logprobs": RefusedField("use /v1/chat/completions", (0,)),
    "truncation": RefusedField("inputs that are too long are refused", ("disabled",)),
}
REFUSED_COUNT_TOKENS: dict[str, RefusedField] = {
    "mcp_servers": RefusedField("the server connects to no MCP servers", ([],)),
    "output_format": RefusedField("use output_config"),
    "speed": RefusedField("there is one speed", ("standard",)),
}
REFUSED_MESSAGES: dict[str, RefusedField] = REFUSED_COUNT_TOKENS | {
    "container": RefusedField("the server runs no tools"),
    "diagnostics": RefusedField(STATEFUL),
    "inference_geo": RefusedField(NOT_BUILT),
    "service_tier": RefusedField("there is one tier", ("auto", "standard_only")),
}
REFUSED_POOLING: dict[str, RefusedField] = {
    "embed_dtype": RefusedField("numbers are float32", ("float32",)),
    "endianness": RefusedField("bytes are little-endian", ("native", "little")),
}
REFUSED: dict[type[msgspec.Struct], Mapping[str, RefusedField]] = {
    schemas.CompletionBody: REFUSED_SAMPLING
    | {"suffix": RefusedField(NOT_BUILT, ("",)), "metadata": RefusedField(STATEFUL, ({},))},
    schemas.ChatBody: REFUSED_SAMPLING | REFUSED_CHAT,
    schemas.ResponsesBody: REFUSED_RESPONSES,
    schemas.InputTokensBody: REFUSED_RESPONSES,
    anthropic_schemas.MessagesBody: REFUSED_MESSAGES,
    anthropic_schemas.CountTokensBody: REFUSED_COUNT_TOKENS,
    pooling_schemas.EmbeddingBody: REFUSED_POOLING,
    pooling_schemas.PoolingBody: REFUSED_POOLING,
    pooling_schemas.ClassifyBody: REFUSED_POOLING | {"messages": RefusedField(NOT_BUILT)},
    pooling_schemas.ScoreBody: {"items": RefusedField("use documents")},
    pooling_schemas.RerankBody: {
        "max_tokens_per_doc": RefusedField("use truncate_prompt_tokens"),
        "max_chunks_per_doc": RefusedField(NOT_BUILT),
        "rank_fields": RefusedField("documents have the field 'text' alone"),
    },
    schemas.LoadAdapterBody: {},
    schemas.UnloadAdapterBody: {},
    schemas.TokenizeBody: {"chat_template": RefusedField(NO_FILES)},
    schemas.DetokenizeBody: {},
}
# msgspec appends the place to its messages: "Expected `int`, got `str` - at `$.n`"
PLACE = re.compile(r"(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?", re.DOTALL)
# the closing quote is optional, so that no quote starts a match twice: the time is linear
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
MISSING = re.compile(r"Object missing required field `(\w+)`")


def decoded(data: bytes, kind: type[Body]) -> Body:
    """The parsed body of a request. Raises ApiError, with the field, for an invalid one."""
    num = data.count(b"[") + data.count(b"{")
    if num > MAX_CONTAINERS and num_containers(data) > MAX_CONTAINERS:
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
    if num > MAX_DEPTH and is_deeper(found, MAX_DEPTH):
        raise _too_deep()
    check_names(found, kind)
    _make_whole(found, kind)
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None


def num_containers(data: bytes) -> int:
    """The number of lists and objects in a JSON text: brackets outside of strings."""
    bare = STRING.sub(b"", data)
    return bare.count(b"[") + bare.count(b"{")


def _too_deep() -> ApiError:
    words = f"the body is nested too deeply: at most {MAX_DEPTH} levels are allowed"
    return ApiError(400, words, code="invalid_json")


def is_deeper(value: Any, most: int) -> bool:
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
