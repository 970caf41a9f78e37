"""Converts a request of Anthropic's API to a chat body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nanovllm.api.anthropic_schemas import CountTokensBody, MessagesBody
from nanovllm.api.chat_messages import known_fields
from nanovllm.api.errors import ApiError, invalid, refused
from nanovllm.api.schemas import ChatBody, Json, JsonSchema, ResponseFormat

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
TEXT, IMAGE, RESULT, CALL = "text", "image", "tool_result", "tool_use"
THINKING, HIDDEN = "thinking", "redacted_thinking"
BLOCKS = {
    USER: (TEXT, IMAGE, RESULT), ASSISTANT: (TEXT, THINKING, HIDDEN, CALL), SYSTEM: (TEXT,),
    RESULT: (TEXT, IMAGE),
}  # fmt: skip
KEYS = {
    TEXT: ("type", "text"), IMAGE: ("type", "source"), THINKING: ("type", "thinking", "signature"),
    RESULT: ("type", "tool_use_id", "content", "is_error"), HIDDEN: ("type", "data"),
    CALL: ("type", "id", "name", "input"),
}  # fmt: skip
TOOL_KEYS = ("type", "name", "description", "input_schema", "strict")
CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": None}
CHOICE_KEYS = ("type", "name", "disable_parallel_tool_use")
IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
FAILED = "Error: "  # prefix of a failed tool's result: templates have no field for the failure


class InputBlock(NamedTuple):
    """A content block: its path in the request, its type, and its supported fields."""

    place: str
    kind: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        return _of_type(self.place, self.fields, name, str, "text")


def as_chat(body: CountTokensBody, most: int) -> ChatBody:
    """The chat body. Raises ApiError, also for more than `most` messages."""
    if not 0 < len(body.messages) <= most:
        words = f"messages has {len(body.messages)} messages: it must have at least 1, at most"
        raise invalid("messages", f"{words} {most}")
    tools = [_tool(f"tools[{number}]", tool) for number, tool in enumerate(body.tools or ())]
    choice, is_parallel = _choice(body.tool_choice)
    thinking, output = body.thinking, body.output_config
    chat = ChatBody(
        messages=_messages(body), model=body.model, tools=tools or None,
        tool_choice=choice if tools or choice not in ("auto", "none") else None,
        parallel_tool_calls=is_parallel,
    )  # fmt: skip
    variables: dict[str, Any] = {}
    if thinking is not None and thinking.type != "adaptive":
        variables["enable_thinking"] = thinking.type == "enabled"
    if thinking is not None and thinking.display == "omitted":
        chat.include_reasoning = False
    if output is not None:
        if output.effort is not None:  # not OpenAI's: it turns no thinking on or off
            variables["reasoning_effort"] = output.effort
        if output.format is not None:
            schema = JsonSchema(name="answer", schema=output.format.schema)
            chat.response_format = ResponseFormat(type="json_schema", json_schema=schema)
    chat.chat_template_kwargs = variables or None
    if chat.messages[-1]["role"] == ASSISTANT:  # a prefilled answer
        chat.continue_final_message = True
    if isinstance(body, MessagesBody):
        chat.max_tokens, chat.stop, chat.stream = body.max_tokens, body.stop_sequences, body.stream
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
    return chat


def _messages(body: CountTokensBody) -> list[Json]:
    found: list[Json] = []
    if body.system:
        found.append({"role": SYSTEM, "content": _texts(_blocks("system", body.system, SYSTEM))})
    turns: list[tuple[str, list[InputBlock]]] = []
    for number, message in enumerate(body.messages):
        place, role = f"messages[{number}]", message.get("role")
        if role not in (USER, ASSISTANT, SYSTEM):
            raise invalid(f"{place}.role", f"{place}.role must be {USER} or {ASSISTANT}")
        blocks = _blocks(f"{place}.content", message.get("content"), role)
        if turns and turns[-1][0] == role:  # consecutive messages of one role are merged
            turns[-1][1].extend(blocks)
        else:
            turns.append((role, blocks))
    for role, blocks in turns:
        if role == ASSISTANT:
            found.append(_answer(blocks))
        elif role == SYSTEM:
            found.append({"role": SYSTEM, "content": _texts(blocks)})
        else:
            found += _asked(blocks)
    last_role, last = turns[-1]
    if last_role == ASSISTANT and any(one.kind == CALL for one in last):
        words = "messages ends with a tool_use: the next message must have its tool_result"
        raise invalid("messages", words)
    return found


def _blocks(place: str, content: Any, of: str) -> list[InputBlock]:
    """The blocks of a message or block. of: its role or type."""
    if isinstance(content, str):
        return [InputBlock(place, TEXT, {"text": content})]
    if not isinstance(content, list):
        raise invalid(place, f"{place} must be text or a list of blocks")
    return [_block(f"{place}[{number}]", one, of) for number, one in enumerate(content)]


def _block(place: str, block: Any, of: str) -> InputBlock:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind not in BLOCKS[of]:
        shown = repr(kind)[:64]
        words = f"{place}.type is {shown}: in {of} it must be one of {', '.join(BLOCKS[of])}"
        raise invalid(f"{place}.type", words)
    return InputBlock(place, kind, known_fields(f"a block of the type {kind}", block, KEYS[kind]))


def _asked(blocks: Sequence[InputBlock]) -> list[Json]:
    """The chat messages of a user's turn: tool results and user content."""
    found: list[Json] = []
    for block in blocks:
        if block.kind == RESULT:
            found.append(_result(block))
        elif found and found[-1]["role"] == USER:
            found[-1]["content"].append(_part(block))
        else:
            found.append({"role": USER, "content": [_part(block)]})
    return found or [{"role": USER, "content": ""}]


def _result(block: InputBlock) -> Json:
    content = block.fields.get("content")
    inner = _blocks(f"{block.place}.content", "" if content is None else content, RESULT)
    parts = list(map(_part, inner))
    if block.fields.get("is_error"):
        begins_with_text = parts and parts[0]["type"] == "text"
        first = parts.pop(0)["text"] if begins_with_text else ""
        parts.insert(0, _text(f"{FAILED}{first}"))
    return {"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": parts}


def _part(block: InputBlock) -> Json:
    return _text(block.text("text")) if block.kind == TEXT else _image(block)


def _text(text: str) -> Json:
    return {"type": "text", "text": text}


def _image(block: InputBlock) -> Json:
    source, place = block.fields.get("source"), f"{block.place}.source"
    kind = source.get("type") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or kind not in ("base64", "url"):
        raise invalid(f"{place}.type", f"{place}.type must be base64 or url")
    if kind == "url":
        return _reference(_of_type(place, source, "url", str, "text"))
    media_type = source.get("media_type")
    if media_type not in IMAGES:
        words = f"{place}.media_type must be one of {', '.join(IMAGES)}"
        raise invalid(f"{place}.media_type", words)
    data = _of_type(place, source, "data", str, "text")
    return _reference(f"data:{media_type};base64,{data}")


def _reference(url: str) -> Json:
    return {"type": "image_url", "image_url": {"url": url}}


def _answer(blocks: Sequence[InputBlock]) -> Json:
    """An assistant message: an earlier answer, or a prefilled one."""
    message: Json = {"role": ASSISTANT, "content": _texts([b for b in blocks if b.kind == TEXT])}
    reasoning = [one.text("thinking") for one in blocks if one.kind == THINKING]
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    calls = [_call(one) for one in blocks if one.kind == CALL]
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: InputBlock) -> Json:
    arguments = _of_type(block.place, block.fields, "input", dict, "an object")
    function = {"name": block.text("name"), "arguments": arguments}
    return {"id": block.text("id"), "type": "function", "function": function}


def _texts(blocks: Sequence[InputBlock]) -> Any:
    """The content of text blocks: a plain string if there is only one."""
    texts = [one.text("text") for one in blocks]
    return list(map(_text, texts)) if len(texts) > 1 else "".join(texts)


def _tool(place: str, tool: Json) -> Json:
    if tool.get("type") not in (None, "custom"):
        shown = repr(tool["type"])[:64]
        raise refused(f"{place}.type", f"{place}.type is {shown}: the server runs no tools")
    tool = known_fields("a tool", tool, TOOL_KEYS)
    function: Json = {key: tool[key] for key in ("name", "description", "strict") if key in tool}
    function["parameters"] = _of_type(place, tool, "input_schema", dict, "an object")
    return {"type": "function", "function": function}


def _choice(choice: Json | None) -> tuple[Any, bool | None]:
    """Chat's `tool_choice` and `parallel_tool_calls`."""
    if choice is None:
        return None, None
    kind = choice.get("type")
    if not isinstance(kind, str) or kind not in CHOICES:
        words = f"tool_choice.type must be one of {', '.join(CHOICES)}"
        raise invalid("tool_choice.type", words)
    for key in choice:
        if key not in CHOICE_KEYS:
            raise refused(f"tool_choice.{key[:64]}", f"tool_choice has no field {key[:64]!r}")
    is_parallel = False if choice.get("disable_parallel_tool_use") else None
    if kind != "tool":
        return CHOICES[kind], is_parallel
    name = _of_type("tool_choice", choice, "name", str, "text")
    return {"type": "function", "function": {"name": name}}, is_parallel


def _of_type(place: str, fields: Mapping[str, Any], name: str, kind: type, words: str) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise _wrong(f"{place}.{name}", words)
    return value


def _wrong(field: str, words: str) -> ApiError:
    return invalid(field, f"{field} must be {words}")
