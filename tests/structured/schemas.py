"""JSON schemas in the manner of the JSON-Schema test suite, made by a seeded generator.

Each function makes schemas of one feature with sizes and values that differ. Answers stay short, so
that most end within a few dozen tokens even if the model writes at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]
Rng = random.Random

FORMATS = (
    "date", "time", "date-time", "duration", "uuid", "ipv4", "ipv6", "email", "hostname", "uri",
)  # fmt: skip
PATTERNS = (
    "^[a-c]{2,4}$", "^\\d{3}-\\d{2}$", "^(cat|dog|bird)$", "^[A-Z][a-z]{0,3}$", "^x+y?$",
    "^#[0-9a-f]{6}$", "^(a|b)(c|d)$", "ab{1,2}", "^[^\\s\"]{1,3}$",
)  # fmt: skip
# keywords that constrain answers, and are refused
UNSUPPORTED: dict[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"minimum": 2}},
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "minContains": {"type": "array", "contains": {"const": 1}, "minContains": 2},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {"type": "object", "dependencies": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "$dynamicRef": {"$dynamicRef": "#node"},
    "$recursiveRef": {"$recursiveRef": "#"},
    "contentEncoding": {"type": "string", "contentEncoding": "base64"},
    "contentMediaType": {"type": "string", "contentMediaType": "application/json"},
    "no_such_keyword": {"type": "integer", "no_such_keyword": 1},
}


def text(rng: Rng) -> Schema:
    return {"type": "string", "maxLength": rng.randint(1, 6)}


def scalar(rng: Rng) -> Schema:
    number = {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 500)}
    return rng.choice([number, {"type": "boolean"}, {"type": "null"}, {"enum": ["a", "b"]}])


def bare_type(rng: Rng) -> Schema:
    return {"type": rng.choice(["boolean", "null", "integer", "number"])}


def list_of_types(rng: Rng) -> Schema:
    return {"type": rng.sample(["boolean", "null", "integer", "string"], 2), "maxLength": 3}


def enum(rng: Rng) -> Schema:
    values = ["red", "grün", 'quo"te', "a\\b", "", 7, -1.5, True, None, [1, "x"], {"k": [None]}]
    return {"enum": rng.sample(values, rng.randint(1, 6))}


def const(rng: Rng) -> Schema:
    values: list[Any] = [
        "fixed",
        "日本",
        0,
        -3,
        2.5,
        False,
        None,
        [],
        {},
        [1, [2]],
        {"a": {"b": 1}},
    ]
    return {"const": rng.choice(values)}


def string_lengths(rng: Rng) -> Schema:
    low = rng.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 5)}


def pattern(rng: Rng) -> Schema:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def string_format(rng: Rng) -> Schema:
    return {"type": "string", "format": rng.choice(FORMATS)}


def integer_range(rng: Rng) -> Schema:
    low = rng.randint(-1200, 900)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 3000)}


def exclusive_range(rng: Rng) -> Schema:
    low = rng.randint(-120, 90)
    kind = rng.choice(["integer", "number"])
    return {"type": kind, "exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 300)}


def number_range(rng: Rng) -> Schema:
    low = rng.randint(-400, 300) / 8
    return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 999) / 10}


def multiple_of(rng: Rng) -> Schema:
    return {"type": "integer", "multipleOf": rng.choice([2, 3, 5, 10, 25, 100])}


def array_bounds(rng: Rng) -> Schema:
    low = rng.randint(0, 3)
    return {
        "type": "array",
        "items": scalar(rng),
        "minItems": low,
        "maxItems": low + rng.randint(0, 2),
    }


def prefix_items(rng: Rng) -> Schema:
    rest = rng.choice([False, {"type": "null"}])
    return {
        "type": "array",
        "prefixItems": [scalar(rng) for _ in range(rng.randint(1, 3))],
        "items": rest,
        "maxItems": 4,
        "minItems": rng.randint(0, 1),
    }


def properties(rng: Rng) -> Schema:
    names = rng.sample(["id", "name", "äöü", "with space", 'q"', "x-y"], rng.randint(1, 4))
    required = rng.sample(names, rng.randint(0, len(names)))
    return {
        "type": "object",
        "properties": {name: scalar(rng) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def nested(rng: Rng, depth: int = 2) -> Schema:
    inner = scalar(rng) if depth == 0 else nested(rng, depth - 1)
    if rng.random() < 0.4:
        return {"type": "array", "items": inner, "minItems": 1, "maxItems": rng.randint(1, 2)}
    return {
        "type": "object",
        "properties": {"in": inner, "n": scalar(rng)},
        "required": ["in"],
        "additionalProperties": False,
    }


def additional_properties(rng: Rng) -> Schema:
    return {
        "type": "object",
        "properties": {"a": scalar(rng)},
        "required": ["a"],
        "additionalProperties": scalar(rng),
        "maxProperties": rng.randint(1, 2),
    }


def pattern_properties(rng: Rng) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,3}$": scalar(rng)},
        "additionalProperties": False,
        "maxProperties": rng.randint(1, 2),
    }


def count_of_properties(rng: Rng) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^[a-c]{1,2}$": {"type": "boolean"}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": rng.randint(1, 2),
    }


def any_of(rng: Rng) -> Schema:
    return {"anyOf": [text(rng), scalar(rng), array_bounds(rng)]}


def one_of(rng: Rng) -> Schema:
    kinds = [{"type": "boolean"}, {"type": "null"}, text(rng), integer_range(rng)]
    return {"oneOf": rng.sample(kinds, rng.randint(2, 3))}


def all_of(rng: Rng) -> Schema:
    low = rng.randint(-20, 20)
    return {"allOf": [{"type": "integer"}, {"minimum": low}, {"maximum": low + rng.randint(5, 60)}]}


def merged_objects(rng: Rng) -> Schema:
    return {
        "allOf": [
            {"type": "object", "properties": {"a": scalar(rng)}, "required": ["a"]},
            {"properties": {"b": scalar(rng)}, "required": ["b"], "maxProperties": 2},
        ]
    }


def reference(rng: Rng) -> Schema:
    return {
        "$defs": {"item": scalar(rng), "pair": {"$ref": "#/$defs/item"}},
        "type": "array",
        "items": {"$ref": rng.choice(["#/$defs/item", "#/$defs/pair"])},
        "maxItems": 3,
    }


def recursion(rng: Rng) -> Schema:
    node = {
        "type": "object",
        "properties": {
            "value": scalar(rng),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


def tree(rng: Rng) -> Schema:
    return {
        "type": "object",
        "properties": {
            "leaf": scalar(rng),
            "branches": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
        },
        "required": ["leaf"],
        "additionalProperties": False,
    }


def booleans(rng: Rng) -> Schema:
    return {
        "type": "object",
        "properties": {"never": False, "flag": {"type": "boolean"}},
        "required": ["flag"],
        "additionalProperties": False,
    }


def annotations(rng: Rng) -> Schema:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "annotations constrain nothing",
        "title": "Answer",
        "description": "an answer",
        "default": 1,
        "examples": [1, 2],
        "deprecated": False,
        "readOnly": False,
        "writeOnly": False,
        **scalar(rng),
    }


def record(rng: Rng) -> Schema:
    return {
        "type": "object",
        "properties": {
            "name": text(rng),
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "mail": {"type": ["string", "null"], "maxLength": 5},
            "tags": {"type": "array", "items": enum(rng), "maxItems": 2},
            "kind": {"const": rng.choice(["user", "bot"])},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    }


FEATURES: tuple[Callable[[Rng], Schema], ...] = (
    bare_type, list_of_types, enum, const, string_lengths, pattern, string_format, integer_range,
    exclusive_range, number_range, multiple_of, array_bounds, prefix_items, properties, nested,
    additional_properties, pattern_properties, count_of_properties, any_of, one_of, all_of,
    merged_objects, reference, recursion, tree, booleans, annotations, record,
)  # fmt: skip


def schemas(num: int) -> Iterator[Schema]:
    """`num` schemas: each feature in turn, with another seed each time."""
    for seed in range(num):
        yield FEATURES[seed % len(FEATURES)](random.Random(seed))
