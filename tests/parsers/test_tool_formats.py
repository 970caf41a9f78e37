"""Calls of tools in the formats of models, whole, cut anywhere, and broken."""

from __future__ import annotations

import json
import random
import sys
import time

import pytest

from nanovllm.parsers import (
    AnswerParser,
    CallStart,
    ContentPart,
    Parsed,
    ToolCall,
    joined,
    reasoning_parser,
    tool_parser,
    tool_parser_for,
)
from nanovllm.parsers.tools import PARSERS

WEATHER = {"city": 'Bad "Tölz" {1}', "days": [1, 19, {"deep": [None, True]}], "x": -1.5e3}
JSON = json.dumps(WEATHER, ensure_ascii=False)
CALL = json.dumps({"name": "weather", "arguments": WEATHER})
ASCII = json.dumps(WEATHER)
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
NAMES = [name for name, one in PARSERS.items() if one.name == name]  # without vLLM's
AROUND = {
    "hermes": "<tool_call>%s</tool_call>", "llama3": "%s", "mistral": "[TOOL_CALLS][%s]",
    "granite": "<|tool_call|>[%s]", "json": "[%s]",
}  # fmt: skip
DEEP = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"


def call(arguments: str = ASCII, name: str = "weather", id: str | None = None) -> ToolCall:
    return ToolCall(name, arguments, id)


# parser, text, what is in it
GOOD: list[tuple[str, str, Parsed]] = [
    ("hermes", "No call, but 1 < 2 <tool", Parsed("No call, but 1 < 2 <tool")),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", Parsed("", [call()])),
    (
        "hermes",
        f"\n\nSee:\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>\nDone",
        Parsed("\n\nSee:\nDone", [call(), call()]),
    ),
    (
        "hermes",
        '\n<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>\n',
        Parsed("", [call('{"a": 1}', "f")]),
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', Parsed("", [call("{}", "f")])),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": null}}</tool_call>',
        Parsed("", [call("{}", "f")]),
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"</tool_call>\\"}"}</tool_call>',
        Parsed("", [call('{"a": "</tool_call>"}', "f")]),
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\\\\"}}</tool_call>',
        Parsed("", [call('{"a": "</tool_call>\\\\"}', "f")]),
    ),
    ("hermes", '<tool_call>{"name": "f"', Parsed('<tool_call>{"name": "f"')),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', Parsed("", [call('{"a": 1}', "f")])),
    (
        "llama3",
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}; '
        '{"name": "g", "parameters": {"a": "}"}}\n',
        Parsed("", [call("{}", "f"), call('{"a": "}"}', "g")]),
    ),
    (
        "llama3",
        'I look.<|python_tag|>{"name": "f", "parameters": {}} So.',
        Parsed("I look.So.", [call("{}", "f")]),
    ),
    ("llama3", '{"answer": {"name": 1}}', Parsed('{"answer": {"name": 1}}')),
    ("llama3", ' {"name": 1}', Parsed(' {"name": 1}')),
    ("llama3", "<|python_tag|>print(1)", Parsed("<|python_tag|>print(1)")),
    ("llama3", 'Text {"name": "f"}', Parsed('Text {"name": "f"}')),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", Parsed("", [call(), call()])),
    ("mistral", f"Yes. [TOOL_CALLS][{CALL}]\n", Parsed("Yes. ", [call()])),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "id": "abc123def", "arguments": {}}]',
        Parsed("", [call("{}", "f", "abc123def")]),
    ),
    (
        "mistral",
        f"[TOOL_CALLS]weather[ARGS]{JSON}[TOOL_CALLS]weather{ASCII}",
        Parsed("", [call(JSON), call()]),
    ),
    (
        "mistral",
        "[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{}",
        Parsed("", [call("{}", "f", "abc123def")]),
    ),
    ("mistral", "[TOOL_CALLS] [1, 2]", Parsed("[TOOL_CALLS] [1, 2]")),
    ("mistral", "[TOOL_CALLS] is a token [ARGS]", Parsed("[TOOL_CALLS] is a token [ARGS]")),
    ("deepseek", DEEP.format(V3.format("weather", JSON)), Parsed("", [call(JSON)])),
    (
        "deepseek",
        "So:" + DEEP.format(V3.format("f", "{}") + "\n" + V3.format("weather", ASCII)) + "\n",
        Parsed("So:", [call("{}", "f"), call()]),
    ),
    (
        "deepseek",
        DEEP.format(V31.format("function", "{}") + V31.format("weather", JSON)),
        Parsed("", [call("{}", "function"), call(JSON)]),
    ),
    ("deepseek", DEEP.format(""), Parsed()),
    ("deepseek", "<｜tool▁call▁begin｜>f", Parsed("<｜tool▁call▁begin｜>f")),
    ("granite", f"<|tool_call|>[{CALL}, {CALL}]", Parsed("", [call(), call()])),
    (
        "granite",
        'So: <tool_call>[{"arguments": {"a": 1}, "name": "f"}]\n',
        Parsed("So: ", [call('{"a": 1}', "f")]),
    ),
    ("granite", f"<|tool_call|>{CALL}", Parsed(f"<|tool_call|>{CALL}")),
    ("json", f" [{CALL}, {CALL}] ", Parsed("", [call(), call()])),
    ("json", "[]", Parsed("[]")),
]
# what is no JSON: parser, text, what it gives
BROKEN: list[tuple[str, str, Parsed]] = [
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": [}}</tool_call>!',
        Parsed("!", [call('{"a": [}}', "f")]),
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": ]}}</tool_call>!',
        Parsed("!", [call('{"a": ]}}', "f")]),
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>',
        Parsed("", [call('{"a": 1}', "f")]),
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "ab', Parsed("", [call('"ab', "f")])),
    ("hermes", '<tool_call>{"a": 1}</tool_call>', Parsed('<tool_call>{"a": 1}</tool_call>')),
    ("llama3", '{"name": "f", "parameters": {"a"! 1}}', Parsed("", [call('{"a"! 1}}', "f")])),
    ("mistral", "[TOOL_CALLS]f[ARGS]no", Parsed("", [call("no", "f")])),
    (
        "mistral",
        '[TOOL_CALLS]f{"a"?}[TOOL_CALLS]g{}',
        Parsed("", [call('{"a"?}', "f"), call("{}", "g")]),
    ),
    ("mistral", '[TOOL_CALLS][{"name": "f"}, 7]', Parsed(", 7]", [call("{}", "f")])),
    (
        "deepseek",
        DEEP.format(V31.format("f", "{]") + V31.format("g", "{}")),
        Parsed("", [call("{]", "f"), call("{}", "g")]),
    ),
    (
        "granite",
        '<|tool_call|>[{"name": "f", "arguments": {"a"?}}]<|tool_call|>[{"name": "g"}]',
        Parsed("", [call('{"a"?}}]', "f"), call("{}", "g")]),
    ),
    ("json", '[{"name": "f", "arguments": {"a": ', Parsed("", [call('{"a": ', "f")])),
]


MARKERS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>", "```json", "```", "<think>", "</think>",
    "<|tool_call|>", "<function=", "</function>", "<parameter=", "</parameter>", "<arg_key>",
    "</arg_key>", "<arg_value>", "</arg_value>",
]  # fmt: skip
PIECES = [
    *MARKERS, '"name"', '"f"', ": ", '"arguments"', "{", "}", "[", "]", '"', "\\", ",", "null", " ",
    "\n", "x", "<", ">", "function",
]  # fmt: skip


@pytest.mark.parametrize("name, text, parsed", GOOD + BROKEN)
def test_calls_and_content_are_found(name: str, text: str, parsed: Parsed) -> None:
    assert tool_parser(name).parse(text) == parsed


@pytest.mark.parametrize("name, text, parsed", GOOD + BROKEN)
def test_the_result_does_not_depend_on_where_the_text_is_cut(
    name: str, text: str, parsed: Parsed
) -> None:
    for at in range(len(text) + 1):
        stream = tool_parser(name).stream()
        parts = [*stream.push(text[:at]), *stream.push(text[at:]), *stream.finish()]
        assert joined(parts) == parsed, at
        assert stream.finish() == []
    stream = tool_parser(name).stream()
    assert joined([*(p for char in text for p in stream.push(char)), *stream.finish()]) == parsed


@pytest.mark.parametrize("name", NAMES)
def test_text_of_markers_and_brackets_never_raises_and_is_the_same_however_cut(name: str) -> None:
    draw = random.Random(name)
    parser = AnswerParser(tool_parser(name), reasoning_parser("think"), ("<|end|>",))
    for _ in range(400):
        text = "".join(draw.choices(PIECES, k=draw.randrange(1, 40)))
        whole = parser.parse(text)
        stream, parts, at = parser.stream(), [], 0
        while at < len(text):
            num = draw.choice((1, 1, 2, 5, 19))
            parts += stream.push(text[at : at + num])
            at += num
        assert joined([*parts, *stream.finish()]) == whole, text


def test_arguments_are_given_before_they_are_complete() -> None:
    stream = tool_parser("hermes").stream()
    assert stream.push('Hi <tool_call>{"name": "f", "arguments": {"a": "b') == [
        ContentPart("Hi "),
        CallStart(0, "f"),
        *tool_parser("json").stream().push('[{"name": "f", "arguments": {"a": "b')[1:],
    ]
    assert [part.text for part in stream.push('c"') + stream.push("}}")] == ['c"', "}"]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "unit",
    ["<tool_call", "<tool_call>{", "[TOOL_CALLS][", '{"name": "', "<｜tool▁call▁begin｜>", " "],
)
def test_every_character_is_read_once(name: str, unit: str) -> None:
    """What is left unread, and looked at again, is shorter than a marker. What is given back to be
    read is not repeated."""
    stream = tool_parser(name).stream()
    text, given = unit * 400, 0
    for at in range(0, len(text), 7):
        given += sum(len(getattr(part, "text", "")) for part in stream.push(text[at : at + 7]))
        unread = len(stream._reader._text) - stream._reader._at
        assert unread < max(map(len, MARKERS)) and len(stream._reader._text) <= unread + 7 + 22
    given += sum(len(getattr(part, "text", "")) for part in stream.finish())
    assert given <= len(text)


@pytest.mark.parametrize("name", NAMES)
def test_the_time_grows_with_the_length_and_not_with_its_square(name: str) -> None:
    """Ten times the text may take thirty times as long, not a hundred times."""

    def seconds(num_chars: int) -> float:
        text, best = "<tool_call>{[TOOL_CALLS][" * (num_chars // 25), float("inf")
        for _ in range(3):
            stream = AnswerParser(tool_parser(name), reasoning_parser("think")).stream()
            start = time.process_time()
            for at in range(0, len(text), 7):
                stream.push(text[at : at + 7])
            stream.finish()
            best = min(best, time.process_time() - start)
        return best

    assert seconds(50_000) < 30 * max(seconds(5_000), 1e-3)


HOSTILE = [
    "{", "<", '"', "\\", " ", '<tool_call>{"name": "f", "arguments": {',
    '<tool_call>{"arguments": "', "<function=f><parameter=a>", "<parameter=",
    "<tool_call>f<arg_key>", "<arg_key>a</arg_key>", "<arg_value>1", "[TOOL_CALLS]f[ARGS]{",
    "[TOOL_CALLS]f[CALL_ID]a", '<|tool_call|>[{"name":"f"},',
    "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{", "<|python_tag|>{", '{"name":"f","parameters":{}};',
    "<think>", "</think> ",
]  # fmt: skip


@pytest.mark.parametrize("begin", ["", '<tool_call>{"name": "f", "arguments": ', "<function=f>"])
@pytest.mark.parametrize("unit", HOSTILE)
def test_the_work_on_any_text_grows_with_its_length(unit: str, begin: str) -> None:
    """Counted in calls of functions, and in characters that are kept to be read."""

    def work(name: str, num_chars: int) -> int:
        parser = AnswerParser(tool_parser(name), reasoning_parser("think"), ("<|end|>",))
        stream, num = parser.stream(), 0
        text = begin + (unit * num_chars)[:num_chars]

        def count(*_: object) -> None:
            nonlocal num
            num += 1

        sys.setprofile(count)
        try:
            for at in range(0, len(text), 5):
                stream.push(text[at : at + 5])
                num += sum(len(stage._reader._text) for stage in stream._stages)
            stream.finish()
        finally:
            sys.setprofile(None)
        return num

    for name in NAMES:
        assert work(name, 800) < 5.5 * work(name, 200), name


def test_a_deeply_nested_value_needs_no_stack() -> None:
    arguments = '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}"
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert tool_parser("hermes").parse(text) == Parsed("", [call(arguments, "f")])


@pytest.mark.parametrize("name", ("hermes", "llama3", "mistral", "granite", "json"))
@pytest.mark.parametrize("key", ("name", "id"))
def test_a_name_that_is_a_deeply_nested_value_raises_nothing(name: str, key: str) -> None:
    deep = "[" * 50_000 + "]" * 50_000
    before = '"name": "f", ' if key == "id" else ""
    text = f'{{{before}"{key}": {deep}, "arguments": {{}}}}'
    found = tool_parser(name).parse(AROUND[name] % text)
    assert found.calls == ([call("{}", "f")] if key == "id" else [])


@pytest.mark.parametrize("name", ("hermes", "llama3", "mistral", "granite", "json"))
def test_half_of_a_surrogate_pair_becomes_a_character_that_can_be_sent(name: str) -> None:
    text = '{"name": "f\\ud83d", "id": "\\ude00i", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}'
    whole = '{"name": "\\ud83d\\ude00", "arguments": {}}'
    found = tool_parser(name).parse(AROUND[name] % text)
    assert found.calls == [call('{"a": "\ufffd"}', "f\ufffd", "\ufffdi")]
    assert tool_parser(name).parse(AROUND[name] % whole).calls == [call("{}", "\U0001f600")]


def test_the_template_tells_the_parser() -> None:
    assert tool_parser_for("… within <tool_call></tool_call> XML tags: …") == "hermes"
    assert tool_parser_for("{{- '[TOOL_CALLS]' + name + '[ARGS]' }}") == "mistral"
    assert tool_parser_for("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' …") == "deepseek"
    llama = '{"name": function name, "parameters": dictionary of argument name and its value}'
    assert tool_parser_for(llama) == "llama3"
    assert tool_parser_for("<tool_call>\n<function=f>\n<parameter=key>") == "qwen3_coder"
    assert tool_parser_for("<tool_call>{function-name}\n<arg_key>{arg-key-1}") == "glm45"
    assert tool_parser_for("respond with <|tool_call|> followed by a JSON list") == "granite"
    assert tool_parser_for("<function=name>{arguments}</function>") is None, "Functionary"
    assert tool_parser_for("<seed:tool_call>\n<function=f>\n<parameter=key>") is None, "Seed-OSS"
    assert tool_parser_for("{{ messages }}") is None and tool_parser_for(None) is None


def test_an_unknown_parser_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'hermès': it must be one of hermes, llama3"):
        tool_parser("hermès")
