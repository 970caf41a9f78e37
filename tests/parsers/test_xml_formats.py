"""Calls of tools whose arguments are XML elements: types, cut anywhere, and broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm.parsers import (
    ArgumentsPart,
    CallStart,
    Parsed,
    TextParser,
    ToolCall,
    joined,
    tool_parser,
)
from nanovllm.parsers.argument_types import ANY, ArgumentTypes, as_json

PARAMETERS = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "lines": {"type": "integer"},
        "ratio": {"type": ["number", "null"]},
        "dry": {"type": "boolean"},
        "tags": {"$ref": "#/$defs/a~1b"},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "mode": {"enum": ["1", "2"]},
        "size": {"oneOf": [{"const": 3}, {"type": "null"}]},
        "loop": {"$ref": "#/properties/loop"},
        "free": {},
        "odd": 7,
    },
    "$defs": {"a/b": {"type": "array"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "edit", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop"}},
]
CODE = "def f():\n\n    return \"<b>\\n</b>\" & {1: 'ü'}\n"


def stream(name: str) -> TextParser:
    return tool_parser(name).with_tools(TOOLS).stream()


def qwen(name: str, **arguments: str) -> str:
    pairs = (f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{''.join(pairs)}</function>\n</tool_call>"


def glm(name: str, **arguments: str) -> str:
    pairs = (
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"


def call(name: str, arguments: Any) -> ToolCall:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name, text)


WRITTEN = {"path": CODE, "lines": "19", "ratio": "-1.5e3", "dry": "True", "tags": '["a", {"b": 1}]'}
MEANT = '{{"path": {}, "lines": 19, "ratio": -1.5e3, "dry": true, "tags": ["a", {{"b": 1}}]}}'
MEANT = MEANT.format(json.dumps(CODE, ensure_ascii=False))
PLAIN = "<tool_call> is no call, 1 < 2 <function=\n"
# parser, text, what is in it
GOOD: list[tuple[str, str, Parsed]] = [
    ("qwen3_coder", qwen("edit", **WRITTEN), Parsed("", [call("edit", MEANT)])),
    ("glm45", glm("edit", **WRITTEN), Parsed("", [call("edit", MEANT)])),
    (
        "qwen3_coder",
        f"See:\n{qwen('stop')}\n{qwen('edit', path='')}\nDone",
        Parsed("See:\nDone", [call("stop", {}), call("edit", {"path": ""})]),
    ),
    (
        "glm45",
        f"See:\n{glm('stop')}\n<tool_call>edit<arg_key>path</arg_key><arg_value>\n</arg_value>"
        "<arg_key>lines</arg_key><arg_value> 1 </arg_value></tool_call>Done",
        Parsed("See:\nDone", [call("stop", {}), call("edit", {"path": "\n", "lines": 1})]),
    ),
    (
        "qwen3_coder",
        "<function=edit><parameter=path>\n\n</parameter><parameter=lines>1</parameter></function>",
        Parsed("", [call("edit", {"path": "", "lines": 1})]),
    ),
    (
        "qwen3_coder",
        qwen("other", x="1", y="one"),
        Parsed("", [call("other", {"x": 1, "y": "one"})]),
    ),
    ("qwen3_coder", PLAIN, Parsed(PLAIN)),
    ("glm45", PLAIN, Parsed(PLAIN)),
    ("glm45", '<tool_call>{"name": "f"}', Parsed('<tool_call>{"name": "f"}')),
]
# marks that are missing or malformed: parser, text, what it gives
BROKEN: list[tuple[str, str, Parsed]] = [
    (
        "qwen3_coder",
        "<function=edit><parameter=path>a\n<parameter=lines>2</function></tool_call>!",
        Parsed("!", [call("edit", {"path": "a", "lines": 2})]),
    ),
    (
        "qwen3_coder",
        "<function=edit><parameter=\nx</parameter> <parameter=lines>2</parameter></tool_call>",
        Parsed("", [call("edit", {"lines": 2})]),
    ),
    (
        "glm45",
        "<tool_call>edit<arg_key>path<arg_value>a<arg_key>lines</arg_key>2</arg_value>"
        "<arg_key>dry</arg_key><arg_value>no</tool_call>!",
        Parsed("!", [call("edit", {"path": "a", "dry": "no"})]),
    ),
    # an answer that was cut off has arguments without their end
    (
        "qwen3_coder",
        qwen("edit", path="a\n").split("</p")[0],
        Parsed("", [call("edit", '{"path": "a\\n')]),
    ),
    (
        "qwen3_coder",
        qwen("edit", lines="19").split("9")[0],
        Parsed("", [call("edit", '{"lines": 1')]),
    ),
    ("glm45", glm("edit", path="ab")[:52], Parsed("", [call("edit", '{"path": "a')])),
    ("glm45", glm("edit", path="ab")[:-1], Parsed("", [call("edit", '{"path": "ab"')])),
    ("glm45", "<tool_call>edit", Parsed("<tool_call>edit")),
    ("qwen3_coder", "<tool_call><function=edit", Parsed("<tool_call><function=edit")),
]


@pytest.mark.parametrize("name, text, parsed", GOOD + BROKEN)
def test_the_result_does_not_depend_on_where_the_text_is_cut(
    name: str, text: str, parsed: Parsed
) -> None:
    for at in range(len(text) + 1):
        answer = stream(name)
        parts = [*answer.push(text[:at]), *answer.push(text[at:]), *answer.finish()]
        assert joined(parts) == parsed, at
    answer = stream(name)
    assert joined([*(p for char in text for p in answer.push(char)), *answer.finish()]) == parsed


@pytest.mark.parametrize(
    ("parameter", "text", "meant"),
    [
        ("path", "19", '"19"'),
        ("path", "null", '"null"'),
        ("lines", " 19 ", "19"),
        ("lines", "19.0", "19.0"),
        ("lines", "1.5", '"1.5"'),
        ("lines", "true", '"true"'),
        ("lines", '"19"', '"\\"19\\""'),
        ("lines", "many", '"many"'),
        ("ratio", "None", "null"),
        ("ratio", "NaN", '"NaN"'),
        ("dry", "False", "false"),
        ("tags", "[1", '"[1"'),
        ("either", "19", "19"),
        ("either", "[19]", '"[19]"'),
        ("mode", "1", '"1"'),
        ("size", "null", "null"),
        ("loop", "[]", "[]"),
        ("free", "1.50", "1.50"),
        ("free", '"a"', '"\\"a\\""'),
        ("odd", "{}", "{}"),
        ("unknown", "true", "true"),
        ("unknown", "[" * 100_000, json.dumps("[" * 100_000)),
    ],
)
def test_the_schema_gives_the_type_of_an_argument(parameter: str, text: str, meant: str) -> None:
    assert as_json(text, ArgumentTypes(TOOLS).of("edit", parameter)) == meant


def test_the_schema_of_an_argument_is_read_once_however_often_it_is_written() -> None:
    num_read = 0

    class Values(list[int]):
        def __iter__(self) -> Iterator[int]:
            nonlocal num_read
            num_read += 1
            return super().__iter__()

    parameters = {"properties": {"a": {"enum": Values([1, 2])}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    found = tool_parser("glm45").with_tools([tool]).parse(glm("f", a="1") * 19)
    assert found.calls == [call("f", {"a": 1})] * 19 and num_read == 1


def test_a_schema_that_refers_to_too_many_others_has_no_known_type() -> None:
    wide = {"anyOf": [{"type": "integer", "title": str(i)} for i in range(50)]}
    types = ArgumentTypes(
        [{"function": {"name": "f", "parameters": {"properties": {
            "few": wide, "many": {"anyOf": [wide, wide, {"anyOf": wide["anyOf"] * 3}]},
        }}}}]
    )  # fmt: skip
    assert types.of("f", "few") == {"integer"} and types.of("f", "many") == ANY


@pytest.mark.parametrize("name, form", [("qwen3_coder", qwen), ("glm45", glm)])
def test_a_string_is_given_before_it_is_complete(name: str, form: Any) -> None:
    text = form("edit", path="first second")
    answer, at = stream(name), text.index(" second")
    assert answer.push(text[:at]) == [CallStart(0, "edit"), ArgumentsPart(0, '{"path": "first')]
    assert answer.push(text[at : at + 3]) == [ArgumentsPart(0, " se")]
