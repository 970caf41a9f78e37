"""Parsers of tool calls, by name, and which one a chat template needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.parsers import formats
from nanovllm.parsers.parts import Parsed, Sink, joined
from nanovllm.parsers.reader import Reader, TextParser, Wait

REQUIRED = "json"  # the parser for answers that `required_schema` constrains


@dataclass(frozen=True)
class ToolParser:
    """needs_special_tokens: the markers of calls are special tokens, so the text must show them."""

    name: str
    needs_special_tokens: bool
    work: Callable[[Reader, Sink], Wait[None]]

    def stream(self) -> TextParser:
        """A parser of one answer that comes in pieces."""
        return TextParser(self.work)

    def parse(self, text: str) -> Parsed:
        """The content and the calls of a whole answer."""
        stream = self.stream()
        return joined([*stream.push(text), *stream.finish()])


PARSERS = {
    one.name: one
    for one in (
        ToolParser("hermes", False, formats.hermes),
        ToolParser("llama3", True, formats.llama3),
        ToolParser("mistral", True, formats.mistral),
        ToolParser("deepseek", True, formats.deepseek),
        ToolParser(REQUIRED, False, formats.json_list),
    )
}
# formats that look similar, and that no parser reads
OTHERS = ("<function=", "<arg_key>", "<｜DSML｜")
MARKS = {
    "deepseek": formats.CALL_BEGIN,
    "mistral": formats.TOOL_CALLS,
    "hermes": formats.TOOL_CALL,
    "llama3": '"parameters": dictionary of argument name',
}


def tool_parser(name: str) -> ToolParser:
    """Raises ValueError for an unknown name."""
    if name not in PARSERS:
        raise ValueError(f"the tool parser is {name!r}: it must be one of {', '.join(PARSERS)}")
    return PARSERS[name]


def tool_parser_for(chat_template: str | None) -> str | None:
    """The name of the parser for the calls that a chat template shows. None if it shows none, or
    calls in a format that no parser reads.

    The template tells more than the architecture: checkpoints of one architecture are trained on
    different formats.
    """
    template = chat_template or ""
    if any(mark in template for mark in OTHERS):
        return None
    return next((name for name, mark in MARKS.items() if mark in template), None)
