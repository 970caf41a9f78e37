"""The JSON schema of answers that must call a tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_DEPTH = 64
# what a schema only mentions: no schemas are in there
DATA = ("const", "enum", "default", "examples")
# keywords with schemas by name
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# of a document of its own, which the parameters are no more
IDENTITY = ("$schema", "$id")


def required_schema(
    tools: Sequence[Mapping[str, Any]], name: str | None = None, *, parallel: bool = True
) -> dict[str, Any]:
    """The schema of [{"name": …, "arguments": …}, …], which the parser "json" reads.

    tools: as in OpenAI's API, {"type": "function", "function": {"name", "parameters"}}.
    name: the tool that must be called; None for any of them, at least one.
    parallel: several calls are allowed. A named tool is called once.

    References within the parameters go on to work. Raises ValueError for no tools, an unknown
    name, and parameters that are no schema or are nested too deeply.
    """
    functions = {str(tool["function"]["name"]): tool["function"] for tool in tools}
    if not functions:
        raise ValueError("tools is empty: there must be a tool to call")
    if name is not None and name not in functions:
        raise ValueError(f"tool_choice names {name!r}: the tools are {', '.join(functions)}")
    allowed = functions if name is None else {name: functions[name]}
    definitions: dict[str, Any] = {}
    calls = []
    for i, (one, function) in enumerate(allowed.items()):
        parameters = function.get("parameters")
        schema = {"type": "object"} if parameters is None else _moved(parameters, f"#/$defs/{i}")
        definitions[str(i)] = schema
        calls.append(_call_schema(one, {"$ref": f"#/$defs/{i}"}))
    listed: dict[str, Any] = {
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
        "$defs": definitions,
    }
    if name is not None or not parallel:
        listed["maxItems"] = 1
    return listed


def _call_schema(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str, depth: int = 0, *, has_names: bool = False) -> Any:
    """The schema with references to its own root changed to references to `root`.

    has_names: the keys are names of properties or definitions, not keywords.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"the parameters of a tool are nested more than {MAX_DEPTH} deep")
    if isinstance(schema, list):
        return [_moved(one, root, depth + 1) for one in schema]
    if not isinstance(schema, Mapping):
        if depth == 0:
            raise ValueError(f"the parameters of a tool are {schema!r}: they must be a JSON schema")
        return schema
    moved = {}
    for key, value in schema.items():
        if has_names:
            moved[key] = _moved(value, root, depth + 1)
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        elif key in DATA:
            moved[key] = value
        elif depth > 0 or key not in IDENTITY:
            moved[key] = _moved(value, root, depth + 1, has_names=key in NAMED)
    return moved
