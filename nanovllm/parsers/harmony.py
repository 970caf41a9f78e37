"""Answers in the Harmony format of gpt-oss, whose messages are in channels.

The prompt ends with <|start|>assistant. The answer is the rest of that message, and others:

    <|channel|>analysis<|message|>…<|end|>
    <|start|>assistant<|channel|>final<|message|>…<|return|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>

The recipient may also follow the role. Texts of several messages are separate lines. Source: OpenAI
2025, https://cookbook.openai.com/articles/openai-harmony.
"""

from __future__ import annotations

import re

from nanovllm.parsers.json_calls import read_value
from nanovllm.parsers.parts import Sink
from nanovllm.parsers.reader import AnswerReader, Emit, Wait, ignore

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
RECIPIENT = " to="  # of the first message, whose role is in the prompt
BEGINNINGS = (START, CHANNEL, RECIPIENT)
MARKS = (START, CHANNEL, END, CALL, RETURN)
ANALYSIS = CHANNEL + "analysis"
FUNCTION = re.compile(r"\bto=functions\.([^\s<]+)")


def read(reader: AnswerReader, sink: Sink, inside: bool, has_calls: bool) -> Wait[None]:
    """The channel "analysis" is reasoning, the others are content; with `has_calls` calls are read.
    inside: the text begins within the analysis."""
    yield from _Messages(reader, sink, has_calls).read(inside)


def read_calls(reader: AnswerReader, sink: Sink) -> Wait[None]:
    """The calls of an answer; the texts of all other messages are content."""
    yield from _Messages(reader, sink, has_calls=True, has_reasoning=False).read(inside=False)


class _Messages:
    """The messages of an answer. Without calls their arguments are content; so is the analysis
    without reasoning."""

    def __init__(
        self, reader: AnswerReader, sink: Sink, has_calls: bool, has_reasoning: bool = True
    ) -> None:
        self._reader, self._sink = reader, sink
        self._has_calls, self._has_reasoning = has_calls, has_reasoning
        self._kinds: set[str] = set()  # of texts so far

    def read(self, inside: bool) -> Wait[None]:
        """Read to the end. inside: the text begins within the analysis."""
        mark = END
        if inside:
            mark = yield from self._reader.until(MARKS, self._reasoning())
        elif (yield from self._reader.accept(RECIPIENT)):
            mark = RECIPIENT
        while mark:
            if mark in BEGINNINGS:
                mark = yield from self._message(mark)
            else:  # text outside of messages
                mark = yield from self._reader.until(MARKS, self._content())

    def _message(self, mark: str) -> Wait[str]:
        """A message after the beginning of its header; returns the mark after it."""
        pieces = [mark]
        mark = yield from self._reader.until((MESSAGE, START, END, CALL, RETURN), pieces.append)
        if mark != MESSAGE:
            return mark
        header = "".join(pieces)
        function = FUNCTION.search(header)
        if function is not None and self._has_calls:
            return (yield from self._call(function[1]))
        is_analysis = ANALYSIS in header and self._has_reasoning
        emit = self._reasoning() if is_analysis else self._content()
        return (yield from self._reader.until(MARKS, emit))

    def _call(self, name: str) -> Wait[str]:
        self._sink.call(name)
        yield from self._reader.spaces()
        if (yield from self._reader.peek()) == "{":
            is_json = yield from read_value(self._reader, self._sink.arguments)
            rest = ignore if is_json else self._sink.arguments
            return (yield from self._reader.until(MARKS, rest))
        pieces: list[str] = []
        mark = yield from self._reader.until(MARKS, pieces.append)
        self._sink.arguments("".join(pieces).strip() or "{}")
        return mark

    def _content(self) -> Emit:
        return self._line(self._sink.content, "content")

    def _reasoning(self) -> Emit:
        return self._line(self._sink.reasoning, "reasoning")

    def _line(self, emit: Emit, kind: str) -> Emit:
        """Emits a text, after a line break if there was a text of this kind before it."""
        needs_break = kind in self._kinds

        def of_text(text: str) -> None:
            nonlocal needs_break
            if text and needs_break:
                text, needs_break = "\n" + text, False
            if text:
                self._kinds.add(kind)
            emit(text)

        return of_text
