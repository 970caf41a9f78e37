"""Reasoning before answers, alone and with calls of tools."""

from __future__ import annotations

import pytest

from nanovllm.parsers import (
    AnswerParser,
    Parsed,
    ToolCall,
    joined,
    reasoning_parser,
    reasoning_parser_for,
    tool_parser,
)

THINK = reasoning_parser("think")
# text, whether the answer begins inside the reasoning, what is in it
CASES = [
    ("<think>\nSo.\n\nYes?\n</think>\n\nYes.", False, Parsed("Yes.", [], "So.\n\nYes?")),
    ("\nSo.\n</think>\n\nYes.", True, Parsed("Yes.", [], "So.")),
    ("<think>So.</think>Yes.", True, Parsed("Yes.", [], "So.")),
    ("<think>\n\n</think>\n\nYes.", False, Parsed("Yes.")),
    ("Yes, <think> is a tag.", False, Parsed("Yes, <think> is a tag.")),
    ("<think>cut of", False, Parsed("", [], "cut of")),
    ("cut of </thi", True, Parsed("", [], "cut of </thi")),
    ("<thi", False, Parsed("<thi")),
    (" \n", False, Parsed(" \n")),
    ("", True, Parsed()),
    ("<think>a</think>b</think>c<think>", False, Parsed("b</think>c<think>", [], "a")),
    (
        "<think>I call <tool_call></think>\n<tool_call>{\"name\": \"f\"}</tool_call>",
        False,
        Parsed("", [ToolCall("f", "{}")], "I call <tool_call>"),
    ),
    (
        "So.</think>Now: <tool_call>{\"name\": \"f\"}</tool_call><|im_end|>\n<|im_end|>",
        True,
        Parsed("Now: ", [ToolCall("f", "{}")], "So."),
    ),
]  # fmt: skip


@pytest.mark.parametrize("text, inside, parsed", CASES)
def test_reasoning_content_and_calls_are_told_apart_however_the_text_is_cut(
    text: str, inside: bool, parsed: Parsed
) -> None:
    parser = AnswerParser(tool_parser("hermes"), THINK, ("<|im_end|>", "<|endoftext|>"))
    assert parser.parse(text, inside) == parsed
    for at in range(len(text) + 1):
        stream = parser.stream(inside)
        parts = [*stream.push(text[:at]), *stream.push(text[at:]), *stream.finish()]
        assert joined(parts) == parsed, at
    stream = parser.stream(inside)
    assert joined([*(p for char in text for p in stream.push(char)), *stream.finish()]) == parsed


def test_without_parsers_all_is_content() -> None:
    text = "<think>a</think><tool_call>{}</tool_call>"
    assert AnswerParser().parse(text) == Parsed(text)


def test_the_prompt_tells_where_the_answer_begins() -> None:
    assert THINK.begins_in("<|im_start|>assistant\n<think>\n")
    assert not THINK.begins_in("<|im_start|>assistant\n")
    assert not THINK.begins_in("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not THINK.begins_in("What does <think> mean?<|im_end|>\n<|im_start|>assistant\n")


def test_the_template_tells_the_marks() -> None:
    assert reasoning_parser_for("{{- '<think>\\n\\n</think>\\n\\n' }}") == "think"
    assert reasoning_parser_for("[THINK]{{ text }}[/THINK]") == "mistral"
    assert reasoning_parser_for("{{ messages }}") is None and reasoning_parser_for(None) is None
    with pytest.raises(ValueError, match="'thought': it must be one of think, mistral"):
        reasoning_parser("thought")


def test_special_tokens_are_needed_if_one_parser_does() -> None:
    assert not AnswerParser(tool_parser("hermes"), THINK).needs_special_tokens
    assert AnswerParser(tool_parser("llama3"), THINK).needs_special_tokens
    assert AnswerParser(None, reasoning_parser("mistral")).needs_special_tokens
