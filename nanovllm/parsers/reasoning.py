"""Parses the reasoning that models write before their answer."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.parsers import harmony
from nanovllm.parsers.parts import Parsed, Sink, joined
from nanovllm.parsers.reader import AnswerReader, TextParser, Wait


@dataclass(frozen=True)
class ReasoningParser:
    """Splits an answer into reasoning and content.

    opening, closing: the marks around the reasoning at the beginning of an answer. Whitespace
    around the reasoning is dropped. Without the closing mark the whole answer is reasoning.
    mark: a text of the chat templates that have them; "" is the closing mark.
    tools: the name of the parser whose calls `stream` reads as well.
    """

    name: str
    opening: str
    closing: str
    needs_special_tokens: bool = False
    mark: str = ""
    tools: str = ""

    def begins_in(self, prompt: str) -> bool:
        """Whether the prompt ends with the opening mark, so that the answer starts as reasoning.

        Some templates write the mark themselves (DeepSeek R1, Qwen 3 Thinking). Others leave it to
        the model (Qwen 3), or write both marks to disable reasoning (enable_thinking=False).
        """
        return prompt.rstrip().endswith(self.opening)

    def stream(self, inside: bool = False, with_calls: bool = False) -> TextParser:
        """A parser for one streamed answer. inside: the prompt has the opening mark. with_calls:
        read those of the parser `tools`."""

        def work(reader: AnswerReader, sink: Sink) -> Wait[None]:
            reader.keep()
            yield from reader.spaces()
            has_opening = yield from reader.accept(self.opening)
            before = reader.kept()
            if inside or has_opening:
                yield from reader.spaces()
                yield from reader.until((self.closing,), sink.reasoning)
                yield from reader.spaces()
            else:
                sink.content(before)
            yield from reader.rest(sink.content)

        return TextParser(work)

    def parse(self, text: str, inside: bool = False) -> Parsed:
        """The reasoning and the content of a whole answer."""
        stream = self.stream(inside)
        return joined([*stream.push(text), *stream.finish()])


@dataclass(frozen=True)
class HarmonyReasoning(ReasoningParser):
    """Reasoning in a channel of its own. Calls are other messages of the same text."""

    def stream(self, inside: bool = False, with_calls: bool = False) -> TextParser:
        return TextParser(lambda reader, sink: harmony.read(reader, sink, inside, with_calls))


PARSERS = {
    one.name: one
    for one in (
        ReasoningParser("think", "<think>", "</think>"),
        ReasoningParser("mistral", "[THINK]", "[/THINK]", needs_special_tokens=True),
        HarmonyReasoning(
            "openai_gptoss",
            harmony.ANALYSIS + harmony.MESSAGE,
            harmony.END,
            needs_special_tokens=True,
            mark=harmony.ANALYSIS,
            tools="openai",
        ),
    )
}


# vLLM's names
PARSERS |= dict.fromkeys(("qwen3", "deepseek_r1", "glm45"), PARSERS["think"])


def reasoning_parser(name: str) -> ReasoningParser:
    """Raises ValueError for an unknown name."""
    if name not in PARSERS:
        raise ValueError(
            f"the reasoning parser is {name!r}: it must be one of {', '.join(PARSERS)}"
        )
    return PARSERS[name]


def reasoning_parser_for(chat_template: str | None) -> str | None:
    """The name of the parser for the marks in a chat template, or None."""
    template = chat_template or ""
    return next(
        (name for name, one in PARSERS.items() if (one.mark or one.closing) in template), None
    )
