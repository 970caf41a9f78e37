"""Calls of tools within text match their schema, and all other text is free."""

from __future__ import annotations

from functools import cache
from typing import Any

import llguidance
import pytest

from nanovllm.config import EngineConfig
from nanovllm.parsers import call_schema, tool_parser
from nanovllm.replicas import child_config
from nanovllm.structured import library
from nanovllm.structured.structural_tag import structural_tag
from nanovllm.structured_params import StructuredOutputsParams
from nanovllm.tokenizer import Tokenizer

NUMBER = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"],
          "additionalProperties": False, "$defs": {"n": {"type": "integer"}}}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": NUMBER, "strict": True}},
    {"type": "function", "function": {"name": "free", "parameters": NUMBER}},
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>'
FREE = '<tool_call>{"name": "free", "arguments": {"b": [1, "}"]}}</tool_call>'
MARKS = tool_parser("hermes").marks


@cache
def tokenizer() -> tuple[Tokenizer, llguidance.LLTokenizer]:
    found = child_config.tokenizer(EngineConfig("tiny-qwen3"))
    assert found is not None
    end = found.encode("<|im_end|>")
    return found, llguidance.LLTokenizer(found.as_json(), found.num_tokens(), end)


def read(text: str, form: StructuredOutputsParams | None = None) -> tuple[str, bool]:
    """What of a text a grammar allows, and whether the answer may end there."""
    assert MARKS is not None
    ours, theirs = tokenizer()
    grammar = library.grammar(
        library.Source("grammar", structural_tag(call_schema(TOOLS), MARKS, form))
    )
    matcher = llguidance.LLMatcher(theirs, grammar, limits=library.limits())
    assert not matcher.is_error(), matcher.get_error()
    ids = ours.encode(text)
    return ours.decode(ids[: matcher.try_consume_tokens(ids)]), matcher.is_accepting()


@pytest.mark.parametrize(
    "text",
    ["", "Hello <tool_ca", CALL, f"I look.\n{CALL}\n{FREE} Done.", f"<think>\n</think>{CALL}"],
)
def test_text_and_right_calls_are_allowed(text: str) -> None:
    assert read(text) == (text, True)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (CALL.replace("3", '"3"'), CALL.partition(" 3")[0]),
        (CALL.replace('"f"', '"g"'), CALL.partition("f")[0]),
        ("No <tool_call>no", "No <tool_call>"),
        (CALL.replace("</", "</x"), CALL.partition("</")[0] + "</"),
    ],
)
def test_a_wrong_call_is_cut_where_it_goes_wrong(text: str, allowed: str) -> None:
    found, may_end = read(text)
    assert allowed.startswith(found.rstrip()) and text.startswith(found) and not may_end


def test_with_a_form_an_answer_is_calls_or_the_form() -> None:
    form = StructuredOutputsParams(json={"type": "object", "properties": {"b": {"type": "null"}},
                                         "additionalProperties": False})  # fmt: skip
    for text in (CALL, f"{CALL}\n{FREE}", '{"b": null}'):
        assert read(text, form) == (text, True)
    for text in ("Hello", '{"b": 1}', f"x{CALL}"):
        assert read(text, form)[0] != text


def test_a_keyword_that_is_not_supported_is_named() -> None:
    wrong: Any = {"type": "object", "not": {}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": wrong, "strict": True}}]
    with pytest.raises(ValueError, match="'not' at #/\\$defs/0"):
        structural_tag(call_schema(tools), ("<", ">"))
