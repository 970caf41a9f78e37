"""The parts of answers, and the collector that parsers write to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ContentPart:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The start of a tool call. index: 0, 1, … in an answer. id: only if the model wrote one."""

    index: int
    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ArgumentsPart:
    """More of a call's arguments."""

    index: int
    text: str


Part: TypeAlias = ContentPart | ReasoningPart | CallStart | ArgumentsPart


@dataclass(slots=True)
class ToolCall:
    """arguments: JSON, or the text that the model wrote instead."""

    name: str
    arguments: str = ""
    id: str | None = None


@dataclass(slots=True)
class Parsed:
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    reasoning: str = ""


def joined(parts: Iterable[Part]) -> Parsed:
    """The whole answer from the parts of a stream."""
    content: list[str] = []
    reasoning: list[str] = []
    arguments: list[list[str]] = []
    calls: list[ToolCall] = []
    for part in parts:
        if isinstance(part, ContentPart):
            content.append(part.text)
        elif isinstance(part, ReasoningPart):
            reasoning.append(part.text)
        elif isinstance(part, CallStart):
            calls.append(ToolCall(part.name, id=part.id))
            arguments.append([])
        else:
            arguments[part.index].append(part.text)
    for call, pieces in zip(calls, arguments):
        call.arguments = "".join(pieces)
    return Parsed("".join(content), calls, "".join(reasoning))


class Sink:
    """Collects parts, and merges adjacent ones of the same kind.

    Leading whitespace of the content is held back and dropped if a call follows. Trailing
    whitespace of the reasoning is dropped.
    """

    def __init__(self) -> None:
        self._done: list[Part] = []
        self._kind: type[ContentPart | ReasoningPart | ArgumentsPart] = ContentPart
        self._pieces: list[str] = []
        self._leading: list[str] | None = []
        self._trailing: list[str] = []  # whitespace of the reasoning
        self._num_calls = 0

    def content(self, text: str) -> None:
        if self._leading is not None:
            self._leading.append(text)
            if not text or text.isspace():
                return
            text, self._leading = "".join(self._leading), None
        self._add(ContentPart, text)

    def reasoning(self, text: str) -> None:
        bare = text.rstrip()
        if bare:
            self._add(ReasoningPart, "".join([*self._trailing, bare]))
            self._trailing.clear()
        if len(bare) < len(text):
            self._trailing.append(text[len(bare) :])

    def call(self, name: str, call_id: str | None = None) -> None:
        """Start a call. The arguments that follow belong to it."""
        self._close()
        self._leading = None
        self._done.append(CallStart(self._num_calls, name, call_id))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        self._add(ArgumentsPart, text)

    def end(self) -> None:
        if self._leading:
            self._add(ContentPart, "".join(self._leading))
        self._leading = None

    def take(self) -> list[Part]:
        """Remove and return the parts so far."""
        self._close()
        done, self._done = self._done, []
        return done

    def _add(self, kind: type[ContentPart | ReasoningPart | ArgumentsPart], text: str) -> None:
        if kind is not self._kind:
            self._close()
            self._kind = kind
        if text:
            self._pieces.append(text)

    def _close(self) -> None:
        if not self._pieces:
            return
        text, self._pieces = "".join(self._pieces), []
        if self._kind is ArgumentsPart:
            self._done.append(ArgumentsPart(self._num_calls - 1, text))
        elif self._kind is ReasoningPart:
            self._done.append(ReasoningPart(text))
        else:
            self._done.append(ContentPart(text))
