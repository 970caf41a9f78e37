"""Checks the messages of a conversation and converts them for chat templates."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from nanovllm.api.errors import TOO_LONG, ApiError, invalid
from nanovllm.api.fields import MAX_CONTAINERS, MAX_DEPTH, is_deeper, num_containers
from nanovllm.chat import CutArguments
from nanovllm.media import mm_inputs as media_given

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")
KEYS = ("role", "content", "tool_calls", *TEXTS)
# Fields of media parts besides the one named after the type. All but the first are options of
# Qwen's processors that would change the model's input: reading the media refuses them by name.
OF_MEDIA = (
    "video_metadata", "use_audio_in_video", "min_pixels", "max_pixels", "total_pixels",
    "resized_height", "resized_width", "fps", "nframes", "video_start", "video_end",
)  # fmt: skip
MAX_LOGGED = 64
logger = logging.getLogger(__name__)
_logged: set[str] = set()  # names of ignored fields


def checked_messages(
    messages: list[dict[str, Any]], most: int, max_chars: int
) -> tuple[list[dict[str, Any]], int]:
    """The messages for the chat template, and their number of characters. Raises ApiError.

    most: the maximum number of messages, and of parts or calls in a message. max_chars: of all.
    """
    if not 0 < len(messages) <= most:
        raise invalid(
            "messages",
            f"messages has {len(messages)} messages: it must have at least 1, at most {most}",
        )
    _check_arguments(messages, max_chars)
    clean = [_message(f"messages[{number}]", one, most) for number, one in enumerate(messages)]
    num_chars = sum(map(_num_chars, clean))
    if num_chars > max_chars:
        raise too_long("messages", num_chars, max_chars)
    return clean, num_chars


def _check_arguments(messages: Sequence[Mapping[str, Any]], max_chars: int) -> None:
    """Refuse arguments of calls that cost much to decode. To the body's limits they are text."""
    texts = list(_argument_texts(messages))
    num_chars = sum(map(len, texts))
    if num_chars > max_chars:
        raise too_long("messages", num_chars, max_chars)
    # most texts have too few brackets to be read for those outside of strings
    if sum(one.count("[") + one.count("{") for one in texts) <= MAX_CONTAINERS:
        return
    if sum(num_containers(one.encode("utf-8", "surrogatepass")) for one in texts) > MAX_CONTAINERS:
        words = f"the arguments of calls have more than {MAX_CONTAINERS} lists and objects"
        raise invalid("messages", words)


def _argument_texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                yield arguments


def too_long(name: str, num_chars: int, max_chars: int) -> ApiError:
    words = f"{name} has {num_chars} characters: at most {max_chars} are allowed"
    return invalid(name, words, TOO_LONG)


def num_chars_of(value: Any) -> int:
    """The number of characters of a value as JSON, as templates write it."""
    return len(msgspec.json.encode(value, enc_hook=str).decode())  # str: for CutArguments


def _num_chars(message: Mapping[str, Any]) -> int:
    """The number of characters of a message. Media have limits of their own."""
    content = message["content"]
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    num = num_chars_of(others) if others else 0
    if isinstance(content, str):
        return num + len(content)
    texts = (part if isinstance(part, str) else part.get("text") for part in content)
    return num + sum(len(text) for text in texts if isinstance(text, str))


def _message(place: str, message: Mapping[str, Any], most: int) -> dict[str, Any]:
    """A message without null fields, with the field names that templates use."""
    clean = {key: value for key, value in message.items() if not _says_nothing(key, value)}
    role = clean.get("role")
    if role not in ROLES:
        words = f"{place}.role is {_short(role)}: it must be one of {', '.join(ROLES)}"
        raise invalid(f"{place}.role", words)
    clean = known_fields("a message", clean, KEYS)
    for key, value in clean.items():
        _check_field(place, key, value)
    if role == "assistant":
        clean.setdefault("content", "")
    for key in ("content", "tool_calls"):
        if isinstance(clean.get(key), list) and len(clean[key]) > most:
            words = f"{place}.{key} has {len(clean[key])} entries: at most {most} are allowed"
            raise invalid(f"{place}.{key}", words)
    clean["content"] = _checked_content(f"{place}.content", clean.get("content"))
    if role == "developer":  # templates use the older name
        clean["role"] = "system"
    if "reasoning" in clean:
        clean["reasoning_content"] = clean.pop("reasoning")
    if "tool_calls" in clean:
        clean["tool_calls"] = _tool_calls(f"{place}.tool_calls", clean["tool_calls"])
    return clean


def known_fields(what: str, given: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """The supported fields. Others are logged, each name once: clients send back answers with extra
    fields of other servers."""
    for key, value in given.items():
        if key not in known and value is not None and len(_logged) < MAX_LOGGED:
            name = f"{what} has the field {_short(key)}, which is ignored"
            if name not in _logged:
                _logged.add(name)
                logger.info("%s", name)
    return {key: value for key, value in given.items() if key in known}


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a field can be dropped. Clients send back answers unchanged."""
    return value is None or (key == "annotations" and value == [])


def _checked_content(place: str, content: Any) -> Any:
    """The content with the supported fields of its parts."""
    if content is None:
        raise invalid(place, f"{place} is missing")
    if not isinstance(content, (str, list)):
        raise invalid(place, f"{place} must be text or a list of parts")
    if isinstance(content, list):
        return [_checked_part(f"{place}[{number}]", part) for number, part in enumerate(content)]
    return content


def _checked_part(place: str, part: Any) -> Any:
    """A checked part. Media are checked where they are read."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, str):
        return part
    if kind == "refusal" and isinstance(part.get("refusal"), str):  # an answer of another model
        return {"type": "text", "text": part["refusal"]}
    if kind in media_given.TYPES:
        return known_fields("a part", part, ("type", kind, *OF_MEDIA))
    if kind != "text":
        words = f"{place}.type is {_short(kind)}: it must be text, {', '.join(media_given.TYPES)}"
        raise invalid(f"{place}.type", words)
    if not isinstance(part.get("text"), str):
        raise invalid(f"{place}.text", f"{place}.text must be text")
    return known_fields("a part", part, ("type", "text"))


def _check_field(place: str, key: str, value: Any) -> None:
    if key in TEXTS and not isinstance(value, str):
        raise invalid(f"{place}.{key}", f"{place}.{key} must be text")


def _tool_calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, as templates expect; OpenAI has JSON text."""
    if not isinstance(calls, list):
        raise invalid(place, f"{place} must be a list")
    return [_tool_call(f"{place}[{number}]", call) for number, call in enumerate(calls)]


def _tool_call(place: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(place, f"{place} must be the call of a function")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _object(arguments) if arguments.strip() else {}
    return {**call, "function": {**function, "arguments": arguments}}


def _object(text: str) -> dict[str, Any] | CutArguments:
    """The arguments of a call. A truncated answer leaves invalid JSON, and no answer is as deep as
    a body may not be."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return CutArguments(text)
    is_whole = isinstance(found, dict) and not is_deeper(found, MAX_DEPTH)
    return found if is_whole else CutArguments(text)


def is_object(text: str) -> bool:
    """Whether the arguments of a call are complete."""
    return isinstance(_object(text), dict)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
