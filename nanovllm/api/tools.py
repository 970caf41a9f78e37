"""Tools and reasoning: the options of a request, and the parsers for its answers."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import invalid, refused
from nanovllm.api.schemas import ChatBody
from nanovllm.parsers import (
    REQUIRED,
    AnswerParser,
    AnswerStream,
    ArgumentsPart,
    CallStart,
    ContentPart,
    Part,
    ReasoningParser,
    ReasoningPart,
    ToolParser,
    call_schema,
    reasoning_parser,
    reasoning_parser_for,
    required_schema,
    tool_parser,
    tool_parser_for,
)
from nanovllm.schedule.logprobs import SHOW_SPECIAL
from nanovllm.serving.async_engine import AsyncEngine
from nanovllm.structured.structural_tag import structural_tag
from nanovllm.structured_params import StructuredOutputsParams

NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
NONE = "none"
SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
ID_CHARS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolParsing:
    """How to parse the answers to a request. parser: None if all text is content.

    form: the constraint on answers. at_most_one: calls after the first are dropped. is_forced:
    answers consist of calls only; a call that is cut off before its name is dropped. id_prefix: of
    the ids of calls. has_short_ids: that of `ToolParser`.
    """

    parser: AnswerParser | None = None
    form: StructuredOutputsParams | None = None
    at_most_one: bool = False
    has_reasoning: bool = True
    is_forced: bool = False
    id_prefix: str = "call_"
    has_short_ids: bool = False

    @property
    def needs_special_tokens(self) -> bool:
        return self.parser is not None and self.parser.needs_special_tokens

    def stream(self, prompt: str) -> AnswerStream | None:
        """A parser for one answer; None if all text is content."""
        if self.parser is None:
            return None
        reasoning = self.parser.reasoning
        return self.parser.stream(reasoning is not None and reasoning.begins_in(prompt))

    def kept(self, parts: Sequence[Part]) -> Iterator[Part]:
        """The parts that the request asked for, with an id for each call."""
        for part in parts:
            is_later = isinstance(part, (CallStart, ArgumentsPart)) and part.index > 0
            if self.at_most_one and is_later:
                continue
            if self.is_forced and isinstance(part, ContentPart):
                continue
            if not self.has_reasoning and isinstance(part, ReasoningPart):
                continue
            yield self._with_id(part) if isinstance(part, CallStart) else part

    def _with_id(self, start: CallStart) -> CallStart:
        """The start of a call with an id: the model's, if it wrote one that can be sent back."""
        if not self.has_short_ids:
            return replace(start, id=start.id or self.id_prefix + secrets.token_hex(12))
        if SHORT_ID.fullmatch(start.id or ""):
            return start
        return replace(start, id="".join(secrets.choice(ID_CHARS) for _ in range(9)))


class Readings:
    """A model's parsers. They are chosen at the first conversation, because the chat template is
    read late."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self._engine, self._config = engine, config
        self._found: tuple[ToolParser | None, ReasoningParser | None, list[str]] | None = None

    def of(self, body: ChatBody, form: StructuredOutputsParams | None) -> ToolParsing:
        """How to parse the answers to a request with this constraint. Raises ValueError or ApiError
        for invalid tools."""
        tools, reasoning, end_texts = self._parsers()
        choice = body.tool_choice
        check_tools(body.tools or [], self._config.max_tools)
        if choice is not None and choice != NONE and not body.tools:
            raise invalid("tool_choice", "tool_choice needs tools")
        has_reasoning = body.include_reasoning is not False
        one = body.parallel_tool_calls is False
        has_short_ids = tools is not None and tools.has_short_ids
        if _is_forced(choice):
            demanded = self._demanded(body.tools or [], _named(choice), parallel=not one)
            parser = AnswerParser(tool_parser(REQUIRED))
            return ToolParsing(parser, demanded, is_forced=True, has_short_ids=has_short_ids)
        is_free = not body.tools or choice == NONE
        if not is_free and tools is None:
            words = "the server has no tool_call_parser for this model: use tool_choice 'required'"
            raise refused("tools", words)
        tools = None if is_free or tools is None else tools.with_tools(body.tools or [])
        if form is not None and tools is None:
            return ToolParsing(form=form)  # the constraint holds for the whole answer
        if tools is not None and (form is not None or _strict(body.tools or []) is not None):
            strict = [tool for tool in body.tools or [] if tool["function"].get("strict")]
            parameters = [tool["function"].get("parameters") for tool in strict]
            self._check_size([*parameters, None if form is None else form.json])
            grammar = _grammar(tools, body.tools or [], form)
            parser = AnswerParser(tools, reasoning if form is None else None)
            return ToolParsing(
                parser, grammar, one, has_reasoning=has_reasoning, has_short_ids=has_short_ids
            )
        if tools is None and reasoning is None:
            return ToolParsing(has_reasoning=has_reasoning)
        parser = AnswerParser(tools, reasoning)
        if parser.needs_special_tokens:
            parser = AnswerParser(tools, reasoning, end_texts)
        return ToolParsing(
            parser, at_most_one=one, has_reasoning=has_reasoning, has_short_ids=has_short_ids
        )

    def _demanded(
        self, tools: Sequence[Any], name: str | None, *, parallel: bool
    ) -> StructuredOutputsParams:
        """The constraint on forced calls, of one tool if it is named. It is on text, and forced
        calls have none beside them."""
        asked = [tool for tool in tools if name in (None, tool["function"]["name"])]
        self._check_size([tool["function"].get("parameters") for tool in asked])
        try:
            schema = required_schema(tools, name, parallel=parallel)
        except ValueError as error:
            raise invalid("tools" if asked else "tool_choice", str(error)) from None
        return StructuredOutputsParams(json=schema)

    def _check_size(self, schemas: Sequence[Any]) -> None:
        """Refuse schemas whose grammar would exceed the engine's limit, before it is built."""
        num_bytes, most = len(msgspec.json.encode(schemas)), self._engine.config.max_grammar_bytes
        if num_bytes > most:
            words = f"the schemas of tools and of the answer have {num_bytes} bytes together"
            raise invalid("tools", f"{words}: at most {most} are allowed")

    def _parsers(self) -> tuple[ToolParser | None, ReasoningParser | None, list[str]]:
        if self._found is None:
            tokenizer = self._engine.tokenizer
            template = None if tokenizer is None else tokenizer.for_reading.chat_template
            if isinstance(template, dict):  # several, by name
                template = template.get("tool_use", template.get("default"))
            tools, reasoning = self._config.tool_call_parser, self._config.reasoning_parser
            tool_name = tool_parser_for(template) if tools == "auto" else tools
            reasoning_name = reasoning_parser_for(template) if reasoning == "auto" else reasoning
            ends = [] if tokenizer is None else [
                tokenizer.decode([one], SHOW_SPECIAL) for one in self._engine.eos_ids
            ]  # fmt: skip
            self._found = (
                None if tool_name in (None, NONE) else tool_parser(str(tool_name)),
                None if reasoning_name in (None, NONE) else reasoning_parser(str(reasoning_name)),
                [text for text in ends if text],
            )
        return self._found


def _is_forced(choice: Any) -> bool:
    """Whether an answer must have a call."""
    return choice == "required" or isinstance(choice, dict)


def _named(choice: Any) -> str | None:
    """The tool that must be called, if tool_choice names one."""
    if not isinstance(choice, dict):
        return None
    function = choice.get("function")
    if choice.keys() != {"type", "function"} or choice["type"] != "function":
        raise invalid("tool_choice", 'tool_choice must be {"type": "function", "function": {…}}')
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid("tool_choice", "tool_choice.function has no name")
    return function["name"]


def _strict(tools: Sequence[Any]) -> int | None:
    """The index of the first strict tool."""
    return next((i for i, tool in enumerate(tools) if tool["function"].get("strict")), None)


def _grammar(
    parser: ToolParser, tools: Sequence[Any], form: StructuredOutputsParams | None
) -> StructuredOutputsParams:
    """A grammar of answers: calls match strict tools' schemas, other text the constraint."""
    if parser.marks is None:
        words = f"on inline tool calls, the tool_call_parser {parser.name!r} cannot enforce"
        if form is None:
            name = f"tools[{_strict(tools)}].function.strict"
            raise refused(name, f"{words} a schema: use tool_choice 'required' or a named one")
        raise refused("tools", f"{words} a form: use tool_choice 'none' or 'required'")
    if form is not None and not form.is_json:
        words = f"tools with an answer by {form.form}: use tool_choice 'none' or 'required'"
        raise refused("tools", words)
    try:
        return StructuredOutputsParams(
            grammar=structural_tag(call_schema(tools), parser.marks, form)
        )
    except ValueError as error:
        raise invalid("tools", f"tools: {error}") from None


def check_tools(tools: Sequence[Any], most: int) -> None:
    """Raises ApiError for more than `most` tools and for invalid ones."""
    if len(tools) > most:
        raise invalid("tools", f"tools has {len(tools)} tools: at most {most} are allowed")
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise invalid(place, f"{place} must have the type 'function' and a function")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            words = "must have 1 … 64 letters, digits, '_', '-' or '.'"
            raise invalid(f"{place}.function.name", f"{place}.function.name {words}")
        if parameters is not None and not isinstance(parameters, dict):
            words = f"{place}.function.parameters must be an object"
            raise invalid(f"{place}.function.parameters", words)
