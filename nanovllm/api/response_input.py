"""Converts the input of a response to messages and tools of chat."""

from __future__ import annotations

from typing import Any

from nanovllm.api.chat_messages import ROLES, known_fields
from nanovllm.api.errors import invalid
from nanovllm.api.schemas import ChatBody, ResponsesBody

# types of text parts
TEXTS = ("input_text", "output_text", "text")
PART_KEYS = ("type", "text", "annotations", "logprobs")
MESSAGE, REASONING = "message", "reasoning"
CALL, OUTPUT = "function_call", "function_call_output"
ITEM_KEYS = {
    MESSAGE: ("type", "role", "content", "id", "status"),
    REASONING: ("type", "summary", "content", "id", "status"),
    CALL: ("type", "call_id", "name", "arguments", "id", "status"),
    OUTPUT: ("type", "call_id", "output", "id", "status"),
}
TOOL_KEYS = ("type", "name", "description", "parameters", "strict")
# message fields that several items of one answer can provide
REASONED, CALLS = "reasoning_content", "tool_calls"


def messages_of(body: ResponsesBody, most: int) -> list[dict[str, Any]]:
    """The conversation as chat messages. Raises ApiError, also for more than `most` items."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not 0 < len(body.input) <= most:
        words = f"input has {len(body.input)} items: it must have at least 1, at most {most}"
        raise invalid("input", words)
    for number, item in enumerate(body.input):
        message = _message_of(f"input[{number}]", item)
        before = messages[-1] if messages else {}
        if before.get("role") == message["role"] == "assistant" and _goes_on(before, message):
            calls = [*before.get(CALLS, ()), *message.get(CALLS, ())]
            messages[-1] = {**before, **message, **({CALLS: calls} if calls else {})}
        else:
            messages.append(message)
    return [{"content": "", **message} for message in messages]


def _goes_on(before: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether an item continues the same answer: reasoning, text, then calls."""
    if REASONED in message:
        return False
    return CALLS in message or not ("content" in before or CALLS in before)


def _message_of(place: str, item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type") or MESSAGE
    if not isinstance(kind, str) or kind not in ITEM_KEYS:
        words = f"{place}.type is not supported: it must be one of {', '.join(ITEM_KEYS)}"
        raise invalid(f"{place}.type", words, "unsupported_parameter")
    item = known_fields("an item", item, ITEM_KEYS[kind])
    if kind == REASONING:
        return _reasoning(place, item)
    if kind == CALL:
        return _call(place, item)
    if kind == OUTPUT:
        call_id = _text(place, item, "call_id")
        return {"role": "tool", "tool_call_id": call_id, "content": _content(place, item, "output")}
    role = item.get("role")
    if role not in ROLES:
        raise invalid(f"{place}.role", f"{place}.role must be one of {', '.join(ROLES)}")
    return {"role": role, "content": _content(place, item, "content")}


def _text(place: str, item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"{place}.{name}", f"{place}.{name} must be text")
    return value


def _content(place: str, item: dict[str, Any], name: str) -> Any:
    content = item.get(name)
    if content is None:
        raise invalid(f"{place}.{name}", f"{place}.{name} is missing")
    if isinstance(content, list):
        return [_part(f"{place}.{name}[{i}]", part) for i, part in enumerate(content)]
    return _text(place, item, name)


def _call(place: str, item: dict[str, Any]) -> dict[str, Any]:
    """An earlier tool call that the client sends back."""
    name, arguments, call_id = (_text(place, item, key) for key in ("name", "arguments", "call_id"))
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", CALLS: [{"id": call_id, "type": "function", "function": function}]}


def _reasoning(place: str, item: dict[str, Any]) -> dict[str, Any]:
    """The reasoning of an earlier answer that the client sends back."""
    texts, content = [], item.get("content") or []
    if not isinstance(content, list):
        raise invalid(f"{place}.content", f"{place}.content must be a list of parts")
    for number, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            where = f"{place}.content[{number}]"
            raise invalid(where, f"{where} must be of the type reasoning_text")
        texts.append(part["text"])
    if item.get("summary"):
        words = f"{place}.summary is not supported: leave it out or []"
        raise invalid(f"{place}.summary", words, "unsupported_parameter")
    return {"role": "assistant", REASONED: "".join(texts)}


def _part(place: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXTS and isinstance(part.get("text"), str):
        known_fields("a part", part, PART_KEYS)
        return {"type": "text", "text": part["text"]}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        known_fields("a part", part, ("type", "image_url", "detail"))
        url = {"url": part["image_url"], "detail": part.get("detail", "auto")}
        return {"type": "image_url", "image_url": url}
    words = f"{place} must be of the type input_text, output_text or input_image"
    raise invalid(place, words, "unsupported_parameter")


def _check_tool(place: str, tool: dict[str, Any]) -> None:
    """Refuse unknown fields of a tool, unless they are null."""
    for key, value in tool.items():
        if key not in TOOL_KEYS and value is not None:
            words = f"{place} has the field {key[:64]!r}, which is not supported"
            raise invalid(f"{place}.{key[:64]}", words, "unsupported_parameter")


def as_chat(body: ResponsesBody) -> ChatBody:
    """A chat body with the request's tools. Raises ApiError."""
    tools = []
    for number, tool in enumerate(body.tools or ()):
        place = f"tools[{number}]"
        if tool.get("type") != "function":
            words = f"{place}.type is not supported: the server runs no tools, use function"
            raise invalid(f"{place}.type", words, "unsupported_parameter")
        _check_tool(place, tool)
        function = {key: tool[key] for key in TOOL_KEYS[1:] if tool.get(key) is not None}
        tools.append({"type": "function", "function": function})
    choice = body.tool_choice if tools or body.tool_choice != "auto" else None
    if isinstance(choice, dict):
        if choice.keys() != {"type", "name"} or choice["type"] != "function":
            raise invalid("tool_choice", 'tool_choice must be {"type": "function", "name": …}')
        choice = {"type": "function", "function": {"name": choice["name"]}}
    return ChatBody(
        messages=[], tools=tools, tool_choice=choice, parallel_tool_calls=body.parallel_tool_calls
    )
