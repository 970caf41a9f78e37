"""llguidance (an extra): its limits, and the conversion of sources to its grammars."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from nanovllm import extras
from nanovllm.checks import InvalidValue
from nanovllm.structured.schema_check import checked_schema
from nanovllm.structured_params import FIELD, StructuredOutputsParams

if TYPE_CHECKING:
    import llguidance

# Whitespace between the parts of JSON: a space, or a newline with indentation. Unbounded, a model
# may generate whitespace until its last token.
WHITESPACE = r" |\n[ \t]{0,32}"
MAX_ERROR_CHARS = 300

# Limits on the cost of a grammar. The library stops after this much work, counted in its own units.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,  # for a grammar's regular expressions, 50,000 per ms
    "step_lexer_fuel": 100_000,  # for the regular expressions in one mask, 14,000 per ms
    "step_max_items": 50_000,  # for the parser in one mask, 20,000 per ms
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,  # 1 to 2 kB each
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # else errors quote the output
}


class Source(NamedTuple):
    """A grammar's source. `kind`: "json" (a schema as JSON), "regex", "lark", or "grammar" (Lark or
    GBNF)."""

    kind: str
    text: str


def check_installed() -> None:
    """Raises ValueError if the library is not installed."""
    if importlib.util.find_spec("llguidance") is None:
        raise InvalidValue(
            FIELD,
            "structured_outputs needs llguidance, which is not installed: "
            + extras.install("structured"),
        )


def source(params: StructuredOutputsParams, max_bytes: int) -> Source:
    """The source for these parameters. Raises ValueError above `max_bytes`, and for schemas that
    `checked_schema` refuses."""
    form = params.form
    if params.is_json:
        if isinstance(params.json, str):
            _check_size(form, params.json, max_bytes)  # before it is decoded
        schema = params.schema()
        _check_size(form, _dumped(schema), max_bytes)
        try:
            checked = checked_schema(schema)
        except ValueError as error:
            raise InvalidValue(FIELD, f"structured_outputs.{form}: {error}") from None
        return Source("json", _dumped(with_options(checked, params)))
    if form == "choice":
        assert params.choice is not None
        text = "start: " + " | ".join(map(_literal, params.choice))
    else:
        text = getattr(params, form)
    _check_size(form, text, max_bytes)
    return Source("lark" if form == "choice" else form, text)


def limits() -> llguidance.LLParserLimits:
    import llguidance

    return llguidance.LLParserLimits(**LIMITS)


def grammar(found: Source) -> str:
    """The library's grammar for a source. Raises ValueError for GBNF with errors."""
    import llguidance

    if found.kind == "json":
        return json.dumps({"grammars": [{"json_schema": json.loads(found.text)}]})
    kinds: dict[str, Any] = {"regex": "regex", "lark": "lark", "grammar": "grammar"}
    return llguidance.grammar_from(kinds[found.kind], found.text)


def short(error: str) -> str:
    """An error of the library in one line."""
    if "NoExtensionBias" in error:
        return "no text matches it"
    if error.startswith("panic"):  # contains paths of the library's sources
        return "the library failed on it"
    text = " ".join(error.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + "…"


def with_options(schema: Any, params: StructuredOutputsParams) -> Any:
    """A schema with the library's options for the requested whitespace."""
    pattern = params.whitespace_pattern
    options: dict[str, Any] = {"whitespace_pattern": WHITESPACE if pattern is None else pattern}
    if params.disable_any_whitespace or pattern == "":
        options = {"whitespace_flexible": False}
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return {**schema, "x-guidance": options}


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _dumped(schema: Any) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(FIELD, f"structured_outputs.json is not JSON: {error}") from None


def _check_size(form: str, text: str, max_bytes: int) -> None:
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    if num_bytes > max_bytes:
        raise InvalidValue(
            FIELD,
            f"structured_outputs.{form} has {num_bytes} bytes: at most {max_bytes} are allowed "
            "(option max_grammar_bytes)",
        )
