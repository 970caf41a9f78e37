"""Parsers of tool calls by name, and the choice of a parser from a chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanovllm.parsers import formats, harmony, xml_calls
from nanovllm.parsers.argument_types import ArgumentTypes
from nanovllm.parsers.parts import Parsed, Sink, joined
from nanovllm.parsers.reader import AnswerReader, TextParser, Wait

REQUIRED = "json"  # the parser for answers that `required_schema` constrains


@dataclass(frozen=True)
class ToolParser:
    """needs_special_tokens: the marks of calls are special tokens, which the text must include.

    work: reads one answer, with the arguments' types for XML formats.
    marks: the texts before and after each call, if a call is the JSON of `call_schema` between them
        and the first of them appears nowhere else.
    has_short_ids: chat templates of this format refuse ids other than 9 letters and digits.
    """

    name: str
    needs_special_tokens: bool
    work: Callable[[AnswerReader, Sink, ArgumentTypes], Wait[None]]
    marks: tuple[str, str] | None = None
    types: ArgumentTypes = field(default_factory=ArgumentTypes)
    has_short_ids: bool = False

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> ToolParser:
        """The parser for requests with these tools. tools: as in OpenAI's API."""
        return replace(self, types=ArgumentTypes(tools))

    def stream(self) -> TextParser:
        """A parser for one streamed answer."""
        return TextParser(lambda reader, sink: self.work(reader, sink, self.types))

    def parse(self, text: str) -> Parsed:
        """The content and the calls of a whole answer."""
        stream = self.stream()
        return joined([*stream.push(text), *stream.finish()])


def _json(
    work: Callable[[AnswerReader, Sink], Wait[None]],
) -> Callable[[AnswerReader, Sink, ArgumentTypes], Wait[None]]:
    """A format with JSON arguments, which needs no types."""
    return lambda reader, sink, _: work(reader, sink)


HERMES_MARKS = formats.TOOL_CALL, formats.END_TOOL_CALL
PARSERS = {
    one.name: one
    for one in (
        ToolParser("hermes", False, _json(formats.hermes), HERMES_MARKS),
        ToolParser("llama3", True, _json(formats.llama3)),
        ToolParser("mistral", True, _json(formats.mistral), has_short_ids=True),
        ToolParser("deepseek", True, _json(formats.deepseek)),
        ToolParser("granite", True, _json(formats.granite)),
        ToolParser("openai", True, _json(harmony.read_calls)),
        ToolParser("qwen3_coder", False, xml_calls.qwen3_coder),
        ToolParser("glm45", False, xml_calls.glm45),
        ToolParser(REQUIRED, False, _json(formats.json_list)),
    )
}
# vLLM's names
PARSERS |= {
    "llama3_json": PARSERS["llama3"],
    "deepseek_v3": PARSERS["deepseek"],
    "deepseek_v31": PARSERS["deepseek"],
    "qwen3_xml": PARSERS["qwen3_coder"],
    "glm47": PARSERS["glm45"],
}
# marks in chat templates; the first match decides. None: a format without a parser
MARKS = {
    "<seed:tool_call>": None,  # Seed-OSS
    "<｜DSML｜": None,  # DeepSeek V3.2
    xml_calls.PARAMETER: "qwen3_coder",
    xml_calls.FUNCTION: None,  # Functionary
    xml_calls.ARG_KEY: "glm45",
    harmony.CHANNEL + "commentary": "openai",
    formats.GRANITE_CALL + " followed by": "granite",
    formats.CALL_BEGIN: "deepseek",
    formats.TOOL_CALLS: "mistral",
    formats.TOOL_CALL: "hermes",
    '"parameters": dictionary of argument name': "llama3",
}


def tool_parser(name: str) -> ToolParser:
    """Raises ValueError for an unknown name."""
    if name not in PARSERS:
        raise ValueError(f"the tool parser is {name!r}: it must be one of {', '.join(PARSERS)}")
    return PARSERS[name]


def tool_parser_for(chat_template: str | None) -> str | None:
    """The name of the parser for the call format in a chat template; None if there is no format,
    or no parser for it.

    The architecture does not determine the format: checkpoints of one architecture are trained on
    different formats.
    """
    template = chat_template or ""
    return next((name for mark, name in MARKS.items() if mark in template), None)
