"""Parsers of tool calls and reasoning in generated text, whole or streamed.

An `AnswerParser` combines a parser for tools and one for reasoning, or has one of them:

    parser = AnswerParser(tool_parser("hermes"), reasoning_parser("think"))
    stream = parser.stream()
    for text in texts:
        parts = stream.push(text)
    parts = stream.finish()

`parser.parse(text)` parses a whole text. A stream gives the same result for any split of the text.
No text raises an error. This package needs no torch.
"""

from nanovllm.parsers.answers import AnswerParser, AnswerStream
from nanovllm.parsers.parts import (
    ArgumentsPart,
    CallStart,
    ContentPart,
    Parsed,
    Part,
    ReasoningPart,
    ToolCall,
    joined,
)
from nanovllm.parsers.reader import TextParser
from nanovllm.parsers.reasoning import ReasoningParser, reasoning_parser, reasoning_parser_for
from nanovllm.parsers.required import call_schema, required_schema
from nanovllm.parsers.tools import REQUIRED, ToolParser, tool_parser, tool_parser_for

__all__ = [
    "REQUIRED",
    "AnswerParser",
    "AnswerStream",
    "ArgumentsPart",
    "CallStart",
    "ContentPart",
    "Parsed",
    "Part",
    "ReasoningParser",
    "ReasoningPart",
    "TextParser",
    "ToolCall",
    "ToolParser",
    "call_schema",
    "joined",
    "reasoning_parser",
    "reasoning_parser_for",
    "required_schema",
    "tool_parser",
    "tool_parser_for",
]
