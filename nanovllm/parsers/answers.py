"""Parses answers into reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.parsers.parts import ContentPart, Parsed, Part, Sink, joined
from nanovllm.parsers.reader import AnswerReader, TextParser, Wait, ignore
from nanovllm.parsers.reasoning import ReasoningParser
from nanovllm.parsers.tools import ToolParser


@dataclass(frozen=True)
class AnswerParser:
    """Parses reasoning at the beginning, then content and calls.

    tools, reasoning: None for answers without them.
    end_texts: special tokens that end an answer, such as "<|eot_id|>". They appear in text decoded
        with `skip_special_tokens=False`. The first of them ends the answer.
    """

    tools: ToolParser | None = None
    reasoning: ReasoningParser | None = None
    end_texts: Sequence[str] = ()

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the text must be decoded with `skip_special_tokens=False`."""
        parts = (self.tools, self.reasoning)
        return any(one is not None and one.needs_special_tokens for one in parts)

    def stream(self, inside_reasoning: bool = False) -> AnswerStream:
        """A parser for one streamed answer.

        inside_reasoning: `ReasoningParser.begins_in` of the prompt.
        """
        stages = [TextParser(self._until_end)] if self.end_texts else []
        with_calls = False
        if self.reasoning is not None:
            with_calls = self.tools is not None and self.reasoning.tools == self.tools.name
            stages.append(self.reasoning.stream(inside_reasoning, with_calls))
        if self.tools is not None and not with_calls:
            stages.append(self.tools.stream())
        return AnswerStream(stages)

    def parse(self, text: str, inside_reasoning: bool = False) -> Parsed:
        """Parse a whole answer."""
        stream = self.stream(inside_reasoning)
        return joined([*stream.push(text), *stream.finish()])

    def _until_end(self, reader: AnswerReader, sink: Sink) -> Wait[None]:
        yield from reader.until(self.end_texts, sink.content)
        yield from reader.rest(ignore)


class AnswerStream:
    """A streamed answer. Each stage parses the content found by the stage before it."""

    def __init__(self, stages: Sequence[TextParser]) -> None:
        self._stages = stages

    def push(self, text: str) -> list[Part]:
        """Parse more text. Returns the new parts."""
        parts: list[Part] = [ContentPart(text)] if text else []
        for stage in self._stages:
            parts = _through(stage, parts)
        return parts

    def finish(self) -> list[Part]:
        """End the text. Returns the remaining parts; [] if called again."""
        parts: list[Part] = []
        for stage in self._stages:
            parts = [*_through(stage, parts), *stage.finish()]
        return parts


def _through(stage: TextParser, parts: Sequence[Part]) -> list[Part]:
    """The parts after this stage has parsed their content."""
    found: list[Part] = []
    for part in parts:
        found += stage.push(part.text) if isinstance(part, ContentPart) else [part]
    return found
