"""The JSON schema of answers that must call a tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_DEPTH = 64
# keywords whose values are data, not schemas
DATA = ("const", "enum", "default", "examples")
# keywords whose values map names to schemas
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# keywords of a whole document; the parameters become part of another one
IDENTITY = ("$schema", "$id")


def required_schema(
    tools: Sequence[Mapping[str, Any]], name: str | None = None, *, parallel: bool = True
) -> dict[str, Any]:
    """The schema of [{"name": …, "arguments": …}, …], which the parser "json" reads.

    tools: as in OpenAI's API, {"type": "function", "function": {"name", "parameters"}}.
    name: the tool that must be called; None for at least one call of any tool.
    parallel: whether several calls are allowed. A named tool is called once.

    References within the parameters stay valid. Raises ValueError for no tools, an unknown name,
    and parameters that are not a schema or are nested too deeply.
    """
    functions = {str(tool["function"]["name"]): tool["function"] for tool in tools}
    if not functions:
        raise ValueError("tools is empty: there must be a tool to call")
    if name is not None and name not in functions:
        raise ValueError(f"tool_choice names {name!r}: the tools are {', '.join(functions)}")
    allowed = functions if name is None else {name: functions[name]}
    call, definitions = _any_call({
        one: function.get("parameters") for one, function in allowed.items()
    })  # fmt: skip
    listed: dict[str, Any] = {"type": "array", "items": call, "minItems": 1, "$defs": definitions}
    if name is not None or not parallel:
        listed["maxItems"] = 1
    return listed


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of {"name": …, "arguments": …}, a call of one of the tools. Tools that are not
    strict accept any object as arguments.

    Raises ValueError as `required_schema` does.
    """
    functions = [tool["function"] for tool in tools]
    call, definitions = _any_call({
        str(one["name"]): one.get("parameters") if one.get("strict") else None for one in functions
    })  # fmt: skip
    return {**call, "$defs": definitions}


def _any_call(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of a call, and the root definitions that it refers to.

    parameters: tool name -> schema; None: any object.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for i, (name, given) in enumerate(parameters.items()):
        schema = {"type": "object"} if given is None else _moved(given, f"#/$defs/{i}")
        definitions[str(i)] = schema
        calls.append(_call_schema(name, {"$ref": f"#/$defs/{i}"}))
    return calls[0] if len(calls) == 1 else {"anyOf": calls}, definitions


def _call_schema(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str, depth: int = 0, *, has_names: bool = False) -> Any:
    """The schema with references to its root changed to references to `root`.

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
