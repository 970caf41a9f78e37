"""Calls of tools and reasoning in the text of answers, whole or as it comes.

An `AnswerParser` has a parser for tools and one for reasoning, or one of them:

    parser = AnswerParser(tool_parser("hermes"), reasoning_parser("think"))
    stream = parser.stream()
    for text in texts:
        parts = stream.push(text)
    parts = stream.finish()

`parser.parse(text)` gives the same for a whole text, however a stream was cut. No text raises an
error. Nothing here needs torch.
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
from nanovllm.parsers.required import required_schema
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
    "joined",
    "reasoning_parser",
    "reasoning_parser_for",
    "required_schema",
    "tool_parser",
    "tool_parser_for",
]
