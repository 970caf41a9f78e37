"""A grammar for answers with tool calls between two marks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nanovllm.structured.library import with_options
from nanovllm.structured.schema_check import checked_schema
from nanovllm.structured_params import StructuredOutputsParams

ANY_JSON = StructuredOutputsParams(json_object=True)


def structural_tag(
    call: Mapping[str, Any], marks: tuple[str, str], form: StructuredOutputsParams | None = None
) -> str:
    """A grammar in Lark's syntax: text after the first mark matches the schema of a call and ends
    with the second mark.

    form: the JSON constraint on answers without calls; answers with calls then have no other text.
    None: any text before, between and after calls.

    Raises ValueError for schemas with unsupported keywords.
    """
    begin, end = map(json.dumps, marks)
    schema = json.dumps(with_options(checked_schema(call), ANY_JSON))
    lines = [f"call: SPACE %json {schema} SPACE {end}", r"SPACE: /\s{0,4}/"]
    if form is None:
        start = "start: (before call)* TEXT"
        # lazy: the text ends at the first mark, so every mark begins a call
        lines += [f"before[lazy]: TEXT {begin}", r"TEXT: /(?s:.*)/"]
    else:
        start = f"start: ({begin} call SPACE)+ | form"
        lines.append(f"form: %json {json.dumps(with_options(checked_schema(form.schema()), form))}")
    return "\n".join([start, *lines, ""])
