"""Answers of gpt-oss: channels of reasoning, content and calls."""

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
    tool_parser_for,
)

BOTH = AnswerParser(
    tool_parser("openai"), reasoning_parser("openai_gptoss"), ("<|return|>", "<|call|>")
)
ARGUMENTS = '{"city": "Oslo <|end|>", "days": [1, {"a": "<|start|>"}]}'
ANALYSIS = "<|channel|>analysis<|message|>"
START, FINAL = "<|start|>assistant", "<|channel|>final<|message|>"
COMMENTARY = "<|channel|>commentary"


def call(name: str = "weather", arguments: str = ARGUMENTS) -> ToolCall:
    return ToolCall(name, arguments)


# text, whether the answer begins within the analysis, what is in it
CASES = [
    (f"{ANALYSIS}So.\n\nOr?<|end|>{START}{FINAL}Yes.\n", False, Parsed("Yes.\n", [], "So.\n\nOr?")),
    (f"{FINAL}Yes.", False, Parsed("Yes.")),
    (f"So.<|end|>{START}{FINAL}Yes.", True, Parsed("Yes.", [], "So.")),
    (f"{ANALYSIS}cut of", False, Parsed("", [], "cut of")),
    (f"{ANALYSIS}a<|end|>{START}{ANALYSIS}b<|end|>", False, Parsed("", [], "a\nb")),
    (f"{ANALYSIS}<|end|>{START}{FINAL}", False, Parsed()),
    ("No channel, 1 <|2", False, Parsed("No channel, 1 <|2")),
    (" to my friend", False, Parsed(" to my friend")),
    (
        f"{ANALYSIS}Weather.<|end|>{START}{COMMENTARY} to=functions.weather <|constrain|>json"
        f"<|message|>{ARGUMENTS}<|call|>",
        False,
        Parsed("", [call()], "Weather."),
    ),
    (
        f"{ANALYSIS}Weather.<|end|>{START} to=functions.weather{COMMENTARY} json<|message|>"
        f"{ARGUMENTS}",
        False,
        Parsed("", [call()], "Weather."),
    ),
    (
        f" to=functions.clock{COMMENTARY} json<|message|><|end|>{START}{COMMENTARY} "
        f"to=functions.weather<|message|>{ARGUMENTS} <|end|>",
        False,
        Parsed("", [call("clock", "{}"), call()]),
    ),
    (
        f"{COMMENTARY}<|message|>I look.<|end|>{START}{COMMENTARY} to=functions.f<|message|>"
        '{"a": 1',
        False,
        Parsed("I look.", [call("f", '{"a": 1')]),
    ),
    (
        f"{COMMENTARY} to=functions.f code<|message|>print(1)<|end|>{START}{FINAL}Done.",
        False,
        Parsed("Done.", [call("f", "print(1)")]),
    ),
    (
        f"{COMMENTARY} to=functions.f<|message|>" '{"a": x}}<|end|>',
        False,
        Parsed("", [call("f", '{"a": x}')]),
    ),
    (f"{COMMENTARY} to=functions.f<|mess", False, Parsed()),
    (f"{COMMENTARY}<|message|>One.<|end|>{START}{FINAL}Two.", False, Parsed("One.\nTwo.")),
    (f"{FINAL}Yes.<|return|>\n{START}{FINAL}No.", False, Parsed("Yes.")),
    (f"{ANALYSIS}Both<|channel|>final<|message|>forgot.", False, Parsed("forgot.", [], "Both")),
]  # fmt: skip


@pytest.mark.parametrize("text, inside, parsed", CASES)
def test_channels_are_told_apart_however_the_text_is_cut(
    text: str, inside: bool, parsed: Parsed
) -> None:
    assert BOTH.parse(text, inside) == parsed
    for at in range(len(text) + 1):
        stream = BOTH.stream(inside)
        parts = [*stream.push(text[:at]), *stream.push(text[at:]), *stream.finish()]
        assert joined(parts) == parsed, at
    stream = BOTH.stream(inside)
    assert joined([*(p for char in text for p in stream.push(char)), *stream.finish()]) == parsed


def test_parts_come_as_soon_as_they_are_known() -> None:
    stream = BOTH.stream()
    assert not stream.push("<|channel|>analysis<|message|>")
    assert joined(stream.push("So")) == Parsed("", [], "So")
    assert not stream.push("<|end|><|start|>assistant<|channel|>commentary to=functions.f<|mes")
    assert joined(stream.push('sage|>{"a"')) == Parsed("", [call("f", '{"a"')])


TEXT = f'{ANALYSIS}So.<|end|>{START}{COMMENTARY} to=functions.f<|message|>{{"a": 1}}<|call|>'


def test_one_of_the_two_parsers_alone() -> None:
    calls = AnswerParser(tool_parser("openai"))
    assert calls.parse(TEXT) == Parsed("So.", [call("f", '{"a": 1}')])
    reasoning = AnswerParser(None, reasoning_parser("openai_gptoss"))
    assert reasoning.parse(TEXT) == Parsed('{"a": 1}', [], "So.")
    assert calls.needs_special_tokens and reasoning.needs_special_tokens
    hermes = AnswerParser(tool_parser("hermes"), reasoning_parser("openai_gptoss"))
    text = f'{FINAL}<tool_call>{{"name": "g"}}</tool_call>'
    assert hermes.parse(text) == Parsed("", [call("g", "{}")])


def test_the_template_chooses_the_parsers() -> None:
    template = '"<|start|>assistant<|channel|>analysis<|message|>" "<|channel|>commentary json"'
    assert tool_parser_for(template) == "openai"
    assert reasoning_parser_for(template) == "openai_gptoss"
    assert reasoning_parser_for("<|assistant|>{{ content }}<|end|>") is None  # of Phi
    assert reasoning_parser("openai_gptoss").begins_in("…<|channel|>analysis<|message|>")


def test_a_call_without_arguments() -> None:
    text = f" to=functions.clock{COMMENTARY} json<|message|><|call|>"
    assert BOTH.parse(text) == Parsed("", [call("clock", "{}")])
