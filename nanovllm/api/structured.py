"""What a request says of the form of its answer, as `SamplingParams.structured_outputs` has it."""

from __future__ import annotations

from typing import Any

from nanovllm.api.bodies import ResponsesBody, Sampling
from nanovllm.api.errors import invalid

KINDS = ("json", "regex", "choice", "grammar", "json_object")
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def structured_outputs(body: Sampling | ResponsesBody) -> dict[str, Any] | None:
    """The form as {kind: value}, with a kind of KINDS; None if any text will do.

    Raises ApiError if a request gives two, or a response_format without its schema.
    """
    found: dict[str, dict[str, Any]] = {}
    if isinstance(body, ResponsesBody):
        given = body.text.format if body.text is not None else None
        if given is not None and (form := _form("text", given.type, given.schema)):
            found["text"] = form
    else:
        found = _of_sampling(body)
    if len(found) > 1:
        names = " and ".join(found)
        raise invalid(list(found)[-1], f"{names} are given: one of them may be")
    return next(iter(found.values()), None)


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The form of answers that match a schema."""
    return {"json": schema}


def _of_sampling(body: Sampling) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    wanted = body.response_format
    if wanted is not None:
        schema = wanted.json_schema.schema if wanted.json_schema is not None else None
        if form := _form("response_format", wanted.type, schema):
            found["response_format"] = form
    if body.structured_outputs is not None:
        found["structured_outputs"] = _checked(body.structured_outputs)
    for name in GUIDED:
        if (value := getattr(body, name)) is not None:
            found[name] = {name.removeprefix("guided_"): value}
    return found


def _form(name: str, kind: str, schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if kind == "json_object":
        return {"json_object": True}
    if kind == "text":
        return None
    if schema is None:
        raise invalid(name, f"{name} has no schema")
    return {"json": schema}


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    form = {kind: value for kind, value in given.items() if value is not None}
    unknown = [kind for kind in form if kind not in KINDS]
    if unknown:
        name = f"structured_outputs.{unknown[0][:64]}"
        raise invalid(name, f"{name} is not supported: use one of {', '.join(KINDS)}")
    if len(form) != 1:
        words = f"structured_outputs has {len(form)} forms: one of {', '.join(KINDS)} is needed"
        raise invalid("structured_outputs", words)
    return form
