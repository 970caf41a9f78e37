"""The value of `SamplingParams(structured_outputs=…)`, with vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nanovllm.checks import InvalidValue, WrongType, checked, hints

FORMS = ("json", "regex", "choice", "grammar", "json_object")
OFF = (None, False, "")
FIELD = "structured_outputs"  # the field of `SamplingParams`, in errors


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The constraint on the output: exactly one of the first five fields is set.

    json: a JSON schema, as a dict or text.
    regex: a regular expression that the whole output matches, in the syntax of Rust's regex crate:
        no look-around, no back-references, no word boundaries.
    choice: the possible outputs.
    grammar: a context-free grammar, in Lark's syntax or GBNF.
    json_object: True for any JSON object.
    disable_any_whitespace: no spaces and newlines between the parts of JSON.
    whitespace_pattern: a regular expression for the whitespace between the parts of JSON.
    disable_fallback: accepted as in vLLM, without effect: there is no fallback.

    The other fields of vLLM's class are supported only with their defaults.
    """

    json: Mapping[str, object] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    disable_fallback: bool = False

    disable_additional_properties: object = False
    structural_tag: object = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is field.default:
                continue
            name, hint = f"structured_outputs.{field.name}", hints(StructuredOutputsParams)
            if hint[field.name] is object and value != field.default:
                raise InvalidValue(
                    FIELD,
                    f"{name} is {value!r}: only {field.default!r} is supported, since "
                    f"{field.name} is not implemented",
                )
            try:
                object.__setattr__(self, field.name, checked(name, value, hint[field.name]))
            except WrongType as error:
                raise InvalidValue(FIELD, str(error)) from None
        self._check()

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> StructuredOutputsParams:
        """The parameters from a dict. Raises ValueError for an unknown field."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(value) - set(known)):
            raise InvalidValue(
                FIELD,
                f"structured_outputs has no field {unknown[0]!r}: the fields are "
                f"{', '.join(known)}",
            )
        return cls(**value)

    @property
    def form(self) -> str:
        """The field of FORMS that is set."""
        return next(name for name in FORMS if getattr(self, name) not in OFF)

    @property
    def is_json(self) -> bool:
        return self.form in ("json", "json_object")

    def schema(self) -> Any:
        """The JSON schema as Python values. Raises ValueError for text that is not JSON."""
        if self.form == "json_object":
            return {"type": "object"}
        if not isinstance(self.json, str):
            return self.json
        try:
            return json.loads(self.json)
        except (ValueError, RecursionError) as error:
            raise InvalidValue(FIELD, f"structured_outputs.json is not JSON: {error}") from None

    def _check(self) -> None:
        given = [name for name in FORMS if getattr(self, name) not in OFF]
        if len(given) != 1:
            raise InvalidValue(
                FIELD,
                f"structured_outputs has {', '.join(given) or 'nothing'}: exactly one of "
                f"{', '.join(FORMS)} must be set",
            )
        if given == ["choice"] and not self.choice:
            words = "structured_outputs.choice is empty: no output is possible"
            raise InvalidValue(FIELD, words)
        for name in ("disable_any_whitespace", "whitespace_pattern"):
            if getattr(self, name) not in (None, False) and not self.is_json:
                raise InvalidValue(
                    FIELD, f"structured_outputs.{name} is set with {given[0]}: it is only for JSON"
                )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise InvalidValue(
                FIELD,
                "structured_outputs has disable_any_whitespace and whitespace_pattern: only one of "
                "them can be set",
            )
