"""Reads tool calls that are JSON objects with a name and arguments."""

from __future__ import annotations

import enum
import json
import re
from typing import Any

from nanovllm.parsers.parts import Sink
from nanovllm.parsers.reader import AnswerReader, Emit, Wait, ignore

IN_STRING = re.compile(r'[^"\\]+')
SCALAR = re.compile(r"[\w+\-.]+")
BETWEEN = re.compile(r"[\w+\-.,:\s]+")  # between the strings and brackets of an object
COMMAS = re.compile(r"[\s,]+")
CLOSING = {"{": "}", "[": "]"}
ARGUMENTS = ("arguments", "parameters")
KEYS = ("name", "id", "type", *ARGUMENTS)


class Outcome(enum.Enum):
    NO_CALL = enum.auto()  # nothing was sent to the sink
    BROKEN = enum.auto()  # the call has begun; the rest is not JSON
    DONE = enum.auto()


def read_string(reader: AnswerReader, emit: Emit) -> Wait[bool]:
    """Read a JSON string and emit it unchanged. False if it does not end."""
    emit((yield from reader.next()))
    while True:
        yield from reader.run(IN_STRING, emit)
        char = yield from reader.next()
        emit(char)
        if char != "\\":
            return char == '"'
        emit((yield from reader.next()))


def read_value(reader: AnswerReader, emit: Emit) -> Wait[bool]:
    """Read a JSON value and emit it unchanged. False as soon as the text cannot be JSON.

    Checks strings and brackets; of other tokens only the characters.
    """
    open_brackets: list[str] = []
    while True:
        char = yield from reader.peek()
        if char == '"':
            is_json = yield from read_string(reader, emit)
        elif char in ("{", "["):
            open_brackets.append(CLOSING[char])
            emit((yield from reader.next()))
            is_json = True
        elif open_brackets and char == open_brackets[-1]:
            open_brackets.pop()
            emit((yield from reader.next()))
            is_json = True
        else:
            is_json = yield from reader.run(BETWEEN if open_brackets else SCALAR, emit)
        if not is_json or not open_brackets:
            return is_json


def read_arguments(reader: AnswerReader, emit: Emit) -> Wait[bool]:
    """Read a call's arguments: an object; a string that contains it, which is decoded; or null for
    no arguments. False where the text is not JSON."""
    char = yield from reader.peek()
    if char in ("{", "["):
        return (yield from read_value(reader, emit))
    pieces: list[str] = []
    is_json = yield from read_value(reader, pieces.append)
    text = "".join(pieces)
    value = _decoded(text) if is_json else text
    emit("{}" if value is None else value if isinstance(value, str) else text)
    return is_json


def _decoded(text: str) -> Any:
    """The value of a JSON text; the text itself if it is not JSON, None if it is nested too deeply.

    A lone surrogate ("\\ud83d" alone) is valid JSON but cannot be encoded in UTF-8. It becomes
    U+FFFD.
    """
    try:
        value = json.loads(text, strict=False)
    except RecursionError:
        return None
    except ValueError:
        return text
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


class _Call:
    """A call being read."""

    def __init__(self, reader: AnswerReader, sink: Sink) -> None:
        self._reader, self._sink = reader, sink
        self._name: str | None = None
        self._id: str | None = None
        self._early: list[str] | None = None  # arguments before the name
        self._has_arguments = self.has_begun = False

    def read_field(self) -> Wait[bool]:
        """Read a key and its value. False if they do not belong to a call."""
        pieces: list[str] = []
        if not (yield from read_string(self._reader, pieces.append)):
            return False
        key = _decoded("".join(pieces))
        yield from self._reader.spaces()
        if not (yield from self._reader.accept(":")):
            return False
        yield from self._reader.spaces()
        if key in ARGUMENTS and not self._has_arguments:
            return (yield from self._read_arguments())
        if self.has_begun:  # its name and id have been sent
            return (yield from read_value(self._reader, ignore))
        return key in KEYS and (yield from self._read_word(key))

    def _read_arguments(self) -> Wait[bool]:
        self._has_arguments = True
        if self._name is None:
            self._early = []
            return (yield from read_arguments(self._reader, self._early.append))
        self._begin(self._name)
        return (yield from read_arguments(self._reader, self._sink.arguments))

    def _read_word(self, key: str) -> Wait[bool]:
        pieces: list[str] = []
        if not (yield from read_value(self._reader, pieces.append)):
            return False
        word = _decoded("".join(pieces))
        if key == "name":
            if not (isinstance(word, str) and word):
                return False
            self._name = word
            if self._early is not None:
                self._begin(word)
        elif key == "id" and isinstance(word, str):
            self._id = word
        return True

    def _begin(self, name: str) -> None:
        self.has_begun = True
        self._reader.kept()
        self._sink.call(name, self._id)
        for piece in self._early or ():
            self._sink.arguments(piece)

    def close(self) -> bool:
        """Finish the object. False if it is not a call."""
        if self._name is None:
            return False
        if not self.has_begun:
            self._begin(self._name)
            self._sink.arguments("{}")
        return True


def read_call(reader: AnswerReader, sink: Sink) -> Wait[Outcome]:
    """Read {"name": …, "arguments" or "parameters": …, "id": …} and send it to the sink.

    After NO_CALL, and only then, the reader still keeps the text that it has read.
    """
    call = _Call(reader, sink)
    is_call = yield from reader.accept("{")
    while is_call:
        yield from reader.run(COMMAS, ignore)
        char = yield from reader.peek()
        if char == "}" and call.close():
            yield from reader.next()
            return Outcome.DONE
        is_call = char == '"' and (yield from call.read_field())
    return Outcome.BROKEN if call.has_begun else Outcome.NO_CALL


def read_calls(reader: AnswerReader, sink: Sink) -> Wait[Outcome]:
    """Read [call, call, …]. NO_CALL if it is not entirely a list of calls; the reader then keeps
    the text after the last call."""
    outcome = Outcome.NO_CALL
    if not (yield from reader.accept("[")):
        return outcome
    while True:
        yield from reader.run(COMMAS, ignore)
        if (yield from reader.accept("]")):
            return outcome
        outcome = yield from read_call(reader, sink)
        if outcome is not Outcome.DONE:
            return outcome
        reader.keep()
