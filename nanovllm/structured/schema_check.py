"""Checks JSON schemas before they are compiled: every keyword is supported or refused by name.

llguidance refuses the keywords of JSON Schema that it cannot enforce. It would silently ignore
other keywords, and apply options of its own in a schema; those are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ANNOTATIONS = frozenset({
    "$schema", "$id", "$comment", "$anchor", "title", "description", "default", "example",
    "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
})  # fmt: skip
SCHEMAS = frozenset({"items", "additionalItems", "additionalProperties"})
LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
DICTS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
VALUES = frozenset({
    "type", "enum", "const", "$ref", "required", "minItems", "maxItems", "minProperties",
    "maxProperties", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
})  # fmt: skip
KNOWN = ANNOTATIONS | SCHEMAS | LISTS | DICTS | VALUES
# keys with this prefix are users' annotations, except the library's options
EXTENSION, OPTIONS = "x-", "x-guidance"

MAX_DEPTH = 64
MAX_NUMBER = 2**63 - 1  # for bounds of integers

_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DAYS = (
    "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"([0-9]{{4}}-{_DAYS}|{_LEAP}-02-29)"
_NO_YEAR_0 = "[0-9]{0,3}[1-9][0-9]{0,3}-"
_NO_LEAP_SECOND = "[^:]*:[^:]*:[0-5]"
# The library's formats accept what RFC 3339 does not: days that a month does not have, and a leap
# second at any time of day.
STRICTER = {
    "date": (f"^{_DATE}$", f"^{_NO_YEAR_0}"),
    "time": (f"^{_NO_LEAP_SECOND}",),
    "date-time": (f"^{_DATE}", f"^{_NO_YEAR_0}", f"^{_NO_LEAP_SECOND}"),
}


def checked_schema(schema: Any) -> Any:
    """A copy of a schema in which formats are as strict as their RFC.

    Raises ValueError, with the place, for unsupported keywords, too deep nesting, and values that
    are not schemas. Other errors are found later.
    """
    return _checked(schema, "#", MAX_DEPTH)


def _checked(schema: Any, place: str, depth: int) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise ValueError(f"the schema at {place} is {_short(schema)}: it must be an object")
    if not depth:
        raise ValueError(f"the schema is nested too deeply: at most {MAX_DEPTH} levels are allowed")
    for name, value in schema.items():
        _check_keyword(name, value, place)
    found = dict(schema)
    for name, inner in _inner(schema):
        found[name] = _rebuilt(name, inner, place, depth - 1)
    for pattern in STRICTER.get(str(schema.get("format")), ()):
        found["allOf"] = [*found.get("allOf", ()), {"pattern": pattern}]
    return found


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, schema[name]) for name in schema if name in SCHEMAS | LISTS | DICTS)


def _rebuilt(name: str, value: Any, place: str, depth: int) -> Any:
    place = f"{place}/{name}"
    if name in DICTS:
        if not isinstance(value, Mapping):
            raise ValueError(f"{place} is {_short(value)}: it must be an object")
        return {key: _checked(one, f"{place}/{key}", depth) for key, one in value.items()}
    if name in LISTS or (name == "items" and isinstance(value, list)):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{place} is {_short(value)}: it must be a list")
        return [_checked(one, f"{place}/{index}", depth) for index, one in enumerate(value)]
    return _checked(value, place, depth)


def _check_keyword(name: Any, value: Any, place: str) -> None:
    is_annotation = str(name).startswith(EXTENSION) and name != OPTIONS
    if name not in KNOWN and not is_annotation:
        raise ValueError(f"the schema has {name!r} at {place}: this keyword is not supported")
    if name == "$ref" and not str(value).startswith("#"):
        raise ValueError(
            f"the schema has $ref {_short(value)} at {place}: only references within the schema, "
            "which begin with '#', are supported"
        )
    if isinstance(value, int) and abs(value) > MAX_NUMBER and name not in ("const", "default"):
        raise ValueError(
            f"{name} is {_short(value)} at {place}: absolute values are at most {MAX_NUMBER}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
