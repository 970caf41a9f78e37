"""Formats of tool calls in which each argument is an XML element, one function each.

The arguments become a JSON object, with the JSON types that the tool's schema allows. Strings are
streamed; other values are sent when complete. Models do not escape XML in values, so a value ends
at the first end mark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanovllm.parsers.argument_types import STRING, ArgumentTypes, as_json, quoted
from nanovllm.parsers.formats import END_TOOL_CALL, NAME, TOOL_CALL
from nanovllm.parsers.parts import Sink
from nanovllm.parsers.reader import AnswerReader, Emit, Wait, ignore

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
ARG_KEY, END_ARG_KEY = "<arg_key>", "</arg_key>"
ARG_VALUE, END_ARG_VALUE = "<arg_value>", "</arg_value>"

TAG_NAME = re.compile(r"[^\s<>]+")
# marks that end a value; those after the first one apply if the model omitted it
VALUE_ENDS = (END_PARAMETER, PARAMETER, END_FUNCTION, END_TOOL_CALL)
ARG_VALUE_ENDS = (END_ARG_VALUE, ARG_KEY, END_TOOL_CALL)
KEY_ENDS = (END_ARG_KEY, ARG_VALUE, END_TOOL_CALL)


def qwen3_coder(reader: AnswerReader, sink: Sink, types: ArgumentTypes) -> Wait[None]:
    """<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>, where
    <tool_call> is optional. A newline after <parameter=key>, and one before </parameter>, are not
    part of the value.

    Templates of Qwen 3 Coder and Qwen 3.5.
    """
    starts = (TOOL_CALL, FUNCTION)
    while mark := (yield from reader.until(starts, sink.content)):
        reader.keep(mark)
        if mark == TOOL_CALL:
            yield from reader.spaces()
            mark = FUNCTION if (yield from reader.accept(FUNCTION)) else ""
        name = (yield from _tag_name(reader)) if mark else ""
        if not name:
            sink.content(reader.kept())
            continue
        reader.kept()
        arguments = _Arguments(reader, sink, name, types)
        if (yield from _parameters(reader, arguments)):
            arguments.end()
        yield from reader.spaces()
        yield from reader.accept(END_TOOL_CALL)
        yield from reader.spaces()


def _parameters(reader: AnswerReader, arguments: _Arguments) -> Wait[bool]:
    """Read parameters and the end of the call. False if the text ends first."""
    mark = ""
    while mark not in (END_FUNCTION, END_TOOL_CALL):
        if mark != PARAMETER:  # else the model omitted the previous value's end
            mark = yield from reader.until((PARAMETER, END_FUNCTION, END_TOOL_CALL), ignore)
        if not mark:
            return False
        if mark == PARAMETER:
            key = yield from _tag_name(reader)
            if not key:
                mark = ""
                continue
            yield from reader.accept("\n")
            mark = yield from arguments.read(key, VALUE_ENDS, drops_break=True)
            if not mark:
                return False
    return True


def _tag_name(reader: AnswerReader) -> Wait[str]:
    """Read the rest of <function=name> or <parameter=key>. Returns the name; "" if malformed."""
    pieces: list[str] = []
    yield from reader.run(TAG_NAME, pieces.append)
    return "".join(pieces) if (yield from reader.accept(">")) else ""


def glm45(reader: AnswerReader, sink: Sink, types: ArgumentTypes) -> Wait[None]:
    """<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>, with or
    without newlines between the elements.

    Templates of GLM 4.5, 4.6 and 4.7.
    """
    while (yield from reader.until((TOOL_CALL,), sink.content)):
        reader.keep(TOOL_CALL)
        name: list[str] = []
        yield from reader.spaces()
        yield from reader.run(NAME, name.append)
        yield from reader.spaces()
        has_key = yield from reader.accept(ARG_KEY)
        if not name or not (has_key or (yield from reader.accept(END_TOOL_CALL))):
            sink.content(reader.kept())
            continue
        reader.kept()
        arguments = _Arguments(reader, sink, "".join(name), types)
        if not has_key or (yield from _pairs(reader, arguments)):
            arguments.end()
        yield from reader.spaces()


def _pairs(reader: AnswerReader, arguments: _Arguments) -> Wait[bool]:
    """Read keys and values, starting inside the first <arg_key>, and the end of the call. False if
    the text ends first."""
    mark = ARG_KEY
    while mark != END_TOOL_CALL:
        if mark != ARG_KEY:  # else the model omitted the previous value's end
            mark = yield from reader.until((ARG_KEY, END_TOOL_CALL), ignore)
        if mark == ARG_KEY:
            key: list[str] = []
            mark = yield from reader.until(KEY_ENDS, key.append)
            if mark == END_ARG_KEY:
                yield from reader.spaces()
                mark = ARG_VALUE if (yield from reader.accept(ARG_VALUE)) else END_ARG_KEY
            if mark == ARG_VALUE:
                mark = yield from arguments.read("".join(key).strip(), ARG_VALUE_ENDS)
        if not mark:
            return False
    return True


class _Arguments:
    """The arguments of a call being read. Sends them to the sink as a JSON object."""

    def __init__(self, reader: AnswerReader, sink: Sink, name: str, types: ArgumentTypes) -> None:
        self._reader, self._sink, self._name, self._types = reader, sink, name, types
        self._before = "{"
        sink.call(name)

    def read(self, key: str, ends: Sequence[str], *, drops_break: bool = False) -> Wait[str]:
        """Read a value and its end mark. Returns the mark; "" at the end of the text. drops_break:
        a trailing newline is not part of the value."""
        self._sink.arguments(f"{self._before}{quoted(key)}: ")
        self._before = ", "
        types = self._types.of(self._name, key)
        if types == STRING:
            self._sink.arguments('"')
            emit = _Escaped(self._sink.arguments, drops_break).add
            mark = yield from self._reader.until(ends, emit)
            self._sink.arguments('"' if mark else "")
            return mark
        pieces: list[str] = []
        mark = yield from self._reader.until(ends, pieces.append)
        text = "".join(pieces)
        value = as_json(text.removesuffix("\n") if drops_break else text, types)
        self._sink.arguments(value if mark else text)
        return mark

    def end(self) -> None:
        self._sink.arguments("{}" if self._before == "{" else "}")


class _Escaped:
    """Emits text as the inside of a JSON string. With `drops_break`, without a trailing newline."""

    def __init__(self, emit: Emit, drops_break: bool) -> None:
        self._emit, self._drops_break, self._held = emit, drops_break, ""

    def add(self, text: str) -> None:
        text = self._held + text
        self._held = "\n" if self._drops_break and text.endswith("\n") else ""
        self._emit(quoted(text.removesuffix(self._held))[1:-1])
