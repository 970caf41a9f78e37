"""What a request says of the form of its answer, as `SamplingParams.structured_outputs` has it."""

from __future__ import annotations

from typing import Any

from nanovllm.api.bodies import ResponsesBody, Sampling
from nanovllm.api.errors import invalid
from nanovllm.structured.params import StructuredOutputsParams

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
WHITESPACE = "guided_whitespace_pattern"


def structured_outputs(body: Sampling | ResponsesBody) -> StructuredOutputsParams | None:
    """The form of the answer; None if any text will do.

    Raises ApiError, which names the field, if a request gives two forms or a wrong one.
    """
    if isinstance(body, ResponsesBody):
        given = body.text.format if body.text is not None else None
        form = None if given is None else _form("text", given.type, given.schema)
        found = {} if form is None else {"text": form}
    else:
        found = _of_sampling(body)
    if len(found) > 1:
        raise invalid(list(found)[-1], f"{' and '.join(found)} are given: one of them may be")
    for name, form in found.items():
        try:
            return StructuredOutputsParams.of(form)
        except ValueError as error:
            raise invalid(name, f"{name}: {error}") from None
    return None


def of_schema(schema: dict[str, Any]) -> StructuredOutputsParams:
    """The form of answers that match a schema."""
    return StructuredOutputsParams(json=schema)


def _of_sampling(body: Sampling) -> dict[str, dict[str, Any]]:
    """The forms that a request gives, by the name of the field."""
    found: dict[str, dict[str, Any]] = {}
    wanted = body.response_format
    if wanted is not None:
        schema = wanted.json_schema.schema if wanted.json_schema is not None else None
        if form := _form("response_format", wanted.type, schema):
            found["response_format"] = form
    if body.structured_outputs is not None:
        found["structured_outputs"] = body.structured_outputs
    for name in GUIDED:
        if (value := getattr(body, name)) is not None:
            found[name] = {name.removeprefix("guided_"): value}
    if body.guided_whitespace_pattern is not None:
        if body.guided_json is None:
            raise invalid(WHITESPACE, f"{WHITESPACE} needs guided_json")
        found["guided_json"]["whitespace_pattern"] = body.guided_whitespace_pattern
    return found


def _form(name: str, kind: str, schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if kind == "json_object":
        return {"json_object": True}
    if kind == "text":
        return None
    if schema is None:
        raise invalid(name, f"{name} has no schema")
    return {"json": schema}
