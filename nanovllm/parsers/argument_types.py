"""The JSON types of arguments that a model writes as plain text.

In an XML format `5` may be a number or a string. The tool's JSON schema decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

ANY: frozenset[str] = frozenset()
STRING = frozenset(["string"])
MAX_SCHEMAS = 100  # visited for the type of one parameter; above it the type is unknown
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
KINDS = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}


class ArgumentTypes:
    """The types of tools' parameters. Anything that is not a JSON schema is ignored."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """tools: as in OpenAI's API."""
        functions = [tool["function"] for tool in tools]
        self._parameters = {str(one["name"]): _mapping(one.get("parameters")) for one in functions}
        self._found: dict[tuple[str, str], frozenset[str]] = {}  # a schema can have long lists

    def of(self, tool: str, parameter: str) -> frozenset[str]:
        """The JSON types that the schema allows; ANY if it does not restrict them."""
        if (tool, parameter) not in self._found:
            root = self._parameters.get(tool, {})
            schema = _mapping(root.get("properties")).get(parameter)
            self._found[tool, parameter] = _types(schema, root)
        return self._found[tool, parameter]


def as_json(text: str, types: frozenset[str]) -> str:
    """An argument as JSON: the text itself if it is a JSON value of these types (True, False and
    None count as JSON's words), else a string."""
    bare = text.strip()
    bare = PYTHON_WORDS.get(bare, bare)
    try:
        value = json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return quoted(text)
    is_text = isinstance(value, str) or (types and types.isdisjoint(_kinds(value)))
    return quoted(text) if is_text else bare


def quoted(text: str) -> str:
    """The text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _kinds(value: Any) -> tuple[str, ...]:
    """The JSON types of a value."""
    if type(value) in (int, float):
        return ("number", "integer") if value == value // 1 else ("number",)
    return (KINDS[type(value)],)


def _types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The types that a schema allows. root: the document that its references resolve in."""
    types: set[str] = set()
    pending, seen = [schema], set()
    while pending:
        one = _mapping(pending.pop())
        if id(one) in seen:
            continue
        seen.add(id(one))
        given, options = one.get("type"), [*_list(one.get("anyOf")), *_list(one.get("oneOf"))]
        values = [one["const"]] if "const" in one else _list(one.get("enum"))
        if "$ref" in one:
            pending.append(_referred(one["$ref"], root))
        elif given is not None:
            types.update([given] if isinstance(given, str) else map(str, _list(given)))
        elif values:
            types.update(kind for value in values for kind in _kinds(value))
        elif options:
            pending += options
        else:
            return ANY
        if len(pending) + len(seen) > MAX_SCHEMAS:
            return ANY
    return frozenset(types)


def _referred(reference: Any, root: Mapping[str, Any]) -> Any:
    """The schema that "#/…" refers to within the parameters."""
    found: Any = root
    for key in str(reference).split("/")[1:]:
        found = _mapping(found).get(key.replace("~1", "/").replace("~0", "~"))
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
