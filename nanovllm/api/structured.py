"""Builds `SamplingParams.structured_outputs` from a request's fields."""

from __future__ import annotations

from typing import Any

from nanovllm.api.errors import ApiError, invalid
from nanovllm.api.schemas import ResponsesBody, Sampling
from nanovllm.structured_params import FIELD as FORM
from nanovllm.structured_params import StructuredOutputsParams

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
MAX_CHOICES = 1 << 16  # the default max_grammar_bytes allows fewer, but is checked later
WHITESPACE = "guided_whitespace_pattern"


def structured_outputs(body: Sampling | ResponsesBody) -> StructuredOutputsParams | None:
    """The constraint on the output; None if any text is allowed.

    Raises ApiError, with the field, if a request has two constraints or an invalid one.
    """
    found = _given(body)
    if len(found) > 1:
        raise invalid(list(found)[-1], f"{' and '.join(found)} cannot be combined")
    for name, form in found.items():
        choices = form.get("choice")
        if isinstance(choices, list) and len(choices) > MAX_CHOICES:
            words = f"{name} has {len(choices)} choices: at most {MAX_CHOICES} are allowed"
            raise invalid(name, words)
        try:
            return StructuredOutputsParams.of(form)
        except ValueError as error:
            raise misfit(name, str(error)) from None
    return None


def form_field(body: Sampling | ResponsesBody) -> str | None:
    """The request field that constrains its output."""
    return next(iter(_given(body)), None)


def misfit(name: str, message: str) -> ApiError:
    """The error for a constraint, under the name of the request's field."""
    if name == FORM:
        return invalid(name, message)
    return invalid(name, f"{name}: {message.removeprefix(FORM).lstrip('.: ')}")


def _given(body: Sampling | ResponsesBody) -> dict[str, dict[str, Any]]:
    """A request's constraints by the name of the field."""
    if not isinstance(body, ResponsesBody):
        return _of_sampling(body)
    given = body.text.format if body.text is not None else None
    form = None if given is None else _form("text", given.type, given.schema)
    return {} if form is None else {"text": form}


def _of_sampling(body: Sampling) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    wanted = body.response_format
    if wanted is not None:
        schema = wanted.json_schema.schema if wanted.json_schema is not None else None
        if form := _form("response_format", wanted.type, schema):
            found["response_format"] = form
    if body.structured_outputs is not None:
        found[FORM] = body.structured_outputs
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
