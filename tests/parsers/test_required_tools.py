"""The JSON schema of answers that must call a tool."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from nanovllm.parsers import REQUIRED, ToolCall, required_schema, tool_parser


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TREE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://example.org/tree",
    "type": "object",
    "properties": {
        "value": {"$ref": "#/$defs/number"},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        "$ref": {"type": "string"},
        "default": {"$ref": "#/$defs/number"},
        "word": {"enum": [{"$ref": "#"}, "a"]},
    },
    "required": ["value"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer"}},
}
TOOLS = [tool("tree", TREE), tool("stop")]


def is_valid(answer: Any, **options: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(required_schema(TOOLS, **options)).is_valid(answer))


def test_calls_of_the_tools_and_nothing_else_are_valid() -> None:
    stop = {"name": "stop", "arguments": {"any": 1}}
    tree = {"name": "tree", "arguments": {"value": 1, "next": {"value": 19}}}
    assert is_valid([stop]) and is_valid([tree, stop, tree])
    assert not is_valid([]) and not is_valid(stop) and not is_valid(["text"])
    assert not is_valid([{"name": "other", "arguments": {}}])
    assert not is_valid([{"name": "tree", "arguments": {}}])
    assert not is_valid([{"name": "stop"}])


def test_references_within_parameters_go_on_to_work() -> None:
    def arguments(**given: Any) -> list[dict[str, Any]]:
        return [{"name": "tree", "arguments": {"value": 1, **given}}]

    assert is_valid(arguments(next={"value": 1, "next": {"value": 2, "next": None}}))
    assert not is_valid(arguments(next={"value": 1, "next": {"value": "two"}}))
    assert is_valid(arguments(**{"$ref": "text"}, word={"$ref": "#"}, default=19))
    assert not is_valid(arguments(default="19"))


def test_one_call_is_allowed_if_the_tool_is_named_or_calls_are_not_parallel() -> None:
    stop, tree = ({"name": name, "arguments": {"value": 1}} for name in ("stop", "tree"))
    assert is_valid([tree], parallel=False) and not is_valid([tree, stop], parallel=False)
    assert is_valid([tree], name="tree") and not is_valid([tree, tree], name="tree")
    assert not is_valid([stop], name="tree")


def test_the_parser_reads_what_the_schema_allows() -> None:
    text = '[{"name": "stop", "arguments": {}}, {"name": "tree", "arguments": {"value": 1}}]'
    parsed = tool_parser(REQUIRED).parse(text)
    assert parsed.calls == [ToolCall("stop", "{}"), ToolCall("tree", '{"value": 1}')]
    assert parsed.content == ""


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="tools is empty"):
        required_schema([])
    with pytest.raises(ValueError, match="tool_choice names 'go': the tools are tree, stop"):
        required_schema(TOOLS, "go")
    with pytest.raises(ValueError, match="are 7: they must be a JSON schema"):
        required_schema([tool("f", 7)])
    deep: Any = {}
    for _ in range(100):
        deep = {"items": deep}
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        required_schema([tool("f", deep)])
