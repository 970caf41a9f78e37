"""Checks the messages of conversations and converts them for chat templates."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import msgspec

from nanovllm.api.errors import invalid
from nanovllm.media import given as media_given

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")
KEYS = ("role", "content", "tool_calls", *TEXTS)


def checked_messages(messages: list[dict[str, Any]], most: int) -> tuple[list[dict[str, Any]], int]:
    """The messages for a template, and their characters. Raises ApiError.

    most: messages, and parts or calls in one of them.
    """
    if not 0 < len(messages) <= most:
        raise invalid(
            "messages",
            f"messages has {len(messages)} messages: it must have at least 1, at most {most}",
        )
    clean = [_message(f"messages[{number}]", one, most) for number, one in enumerate(messages)]
    return clean, sum(map(_num_chars, clean))


def num_chars_of(value: Any) -> int:
    """The characters of a value as JSON, which is how templates write it."""
    return len(msgspec.json.encode(value).decode())


def _num_chars(message: Mapping[str, Any]) -> int:
    """The characters of a message. Images and sound have limits of their own."""
    content = message["content"]
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    num = num_chars_of(others) if others else 0
    if isinstance(content, str):
        return num + len(content)
    texts = (part if isinstance(part, str) else part.get("text") for part in content)
    return num + sum(len(text) for text in texts if isinstance(text, str))


def _message(place: str, message: Mapping[str, Any], most: int) -> dict[str, Any]:
    """A message without fields that are null, and with the names that templates know."""
    clean = {key: value for key, value in message.items() if not _says_nothing(key, value)}
    role = clean.get("role")
    if role not in ROLES:
        words = f"{place}.role is {_short(role)}: it must be one of {', '.join(ROLES)}"
        raise invalid(f"{place}.role", words)
    check_keys(place, clean, KEYS)
    for key, value in clean.items():
        _check_field(place, key, value)
    if "content" not in clean and role == "assistant" and "tool_calls" in clean:
        clean["content"] = ""
    for key in ("content", "tool_calls"):
        if isinstance(clean.get(key), list) and len(clean[key]) > most:
            words = f"{place}.{key} has {len(clean[key])} entries: at most {most} are allowed"
            raise invalid(f"{place}.{key}", words)
    _check_content(f"{place}.content", clean.get("content"))
    if role == "developer":  # templates use the older name
        clean["role"] = "system"
    if "reasoning" in clean:
        clean["reasoning_content"] = clean.pop("reasoning")
    if "tool_calls" in clean:
        clean["tool_calls"] = _tool_calls(f"{place}.tool_calls", clean["tool_calls"])
    return clean


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a field may be left out. Clients send back the messages of answers as they are."""
    return value is None or (key == "annotations" and value == [])


def _check_content(place: str, content: Any) -> None:
    if content is None:
        raise invalid(place, f"{place} is missing")
    if not isinstance(content, (str, list)):
        raise invalid(place, f"{place} must be text or a list of parts")
    if isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(f"{place}[{number}]", part)


def _check_part(place: str, part: Any) -> None:
    """Images and sound are checked where they are read."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, str) or kind in media_given.TYPES:
        return
    if kind != "text":
        words = f"{place}.type is {_short(kind)}: it must be text, {', '.join(media_given.TYPES)}"
        raise invalid(f"{place}.type", words)
    if not isinstance(part.get("text"), str):
        raise invalid(f"{place}.text", f"{place}.text must be text")
    check_keys(place, part, ("type", "text"))


def check_keys(place: str, given: Mapping[str, Any], known: Container[str]) -> None:
    """Refuse fields that are not known, unless they are null."""
    for key, value in given.items():
        if key not in known and value is not None:
            words = f"{place} has the field {_short(key)}, which is not supported"
            raise invalid(f"{place}.{key[:64]}", words, "unsupported_parameter")


def _check_field(place: str, key: str, value: Any) -> None:
    if key in TEXTS and not isinstance(value, str):
        raise invalid(f"{place}.{key}", f"{place}.{key} must be text")


def _tool_calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Calls with their arguments as objects: OpenAI has them as JSON text, templates do not."""
    if not isinstance(calls, list):
        raise invalid(place, f"{place} must be a list")
    return [_tool_call(f"{place}[{number}]", call) for number, call in enumerate(calls)]


def _tool_call(place: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(place, f"{place} must be the call of a function")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError):
            words = f"{place}.function.arguments is not JSON"
            raise invalid(f"{place}.function.arguments", words) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
