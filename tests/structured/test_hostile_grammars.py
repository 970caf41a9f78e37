"""Grammars that would take much time, memory or stack are refused with the reason, or end their own
answer; other requests go on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.structured import grammar_sandbox, library

PROMPT = "What is 2 + 3?"
SECONDS = 60.0  # on a busy machine


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    yield LLM(
        "tiny-qwen3", device="cpu", enforce_eager=True, max_num_seqs=12, max_model_len=128,
        max_cached_grammars=3, grammar_timeout_s=SECONDS / 2,
    )  # fmt: skip


def chain(num: int, keyword: str) -> dict[str, Any]:
    """Definitions of which each uses the next one."""
    names = [f"#/$defs/n{i}" for i in range(1, num + 1)]
    uses: list[Any] = [{"$ref": name} for name in names]
    if keyword != "$ref":
        uses = [{keyword: [one, {"minimum": 1}]} for one in uses]
    defs = {f"n{i}": one for i, one in enumerate([*uses, {"type": "integer"}])}
    return {"$ref": "#/$defs/n0", "$defs": defs}


def wide(num: int) -> dict[str, Any]:
    """An object with many optional properties of patterns that all differ."""
    return {
        "type": "object",
        "properties": {f"p{i}": {"pattern": f"^a{{{i}}}(b|c)*$"} for i in range(num)},
    }


NESTED = "start: r0\n" + "".join(f'r{i}: r{i + 1} r{i + 1} | "a"\n' for i in range(4000))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rules that nest deeply": ({"grammar": NESTED + 'r4000: "b"'}, "nested too deeply"),
    "references that nest deeply": ({"json": chain(3000, "$ref")}, "nested too deeply"),
    "allOf that nests deeply": ({"json": chain(1500, "allOf")}, "nested too deeply"),
    "a regex that nests deeply": ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex"),
    "a group that nests deeply": ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "nest"),
    "a product of alternatives": (
        {
            "json": {
                "allOf": [
                    {"anyOf": [{"required": [f"p{i}{j}"]} for j in range(9)]} for i in range(12)
                ]
            }
        },
        "too large",
    ),
    "a divisor with a large automaton": (
        {"json": {"type": "integer", "multipleOf": 999_999_937}},
        "fuel exhausted",
    ),
    "an intersection with a large automaton": (
        {"grammar": "start: A\nA: /(.*a.{20}){3}/ & /(.*b.{21}){3}/ & ~/(.*c.{22}){3}/"},
        "fuel exhausted",
    ),
    "an endless recursion": ({"json": {"$ref": "#"}}, "no text matches"),
    "a rule that only uses itself": ({"grammar": "start: start"}, "no text matches"),
    "an empty class": ({"regex": r"[^\s\S]"}, "no text matches"),
    "look-around": ({"regex": "(?=a)b"}, "look-around"),
    "back-references": ({"regex": r"(a)\1"}, "backreferences"),
    "GBNF with an error": ({"grammar": "root ::= ((("}, r"Expected '\)'"),
    "a reference to nothing": ({"json": {"$ref": "#/$defs/none"}}, "none"),
    "oneOf that overlaps": (
        {"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
        "oneOf",
    ),
    "a format that is not known": ({"json": {"type": "string", "format": "iri"}}, "iri"),
    "an impossible schema": ({"json": {"enum": []}}, "empty"),
}
# accepted, since they cost little until their answers become long
ENDING = {
    "(a|b)*a(a|b){1000}", "((a{1,100}){1,100}){1,100}", "a{1,1000000}", "(.*a){30}", "(a+)+b",
    r"(\p{L}|\p{N}){1,5000}",
}  # fmt: skip


def ended(llm: LLM, given: dict[str, Any]) -> Any:
    start = time.monotonic()
    params = SamplingParams(max_tokens=20, seed=0, structured_outputs=given)
    free = SamplingParams(max_tokens=20, seed=0, ignore_eos=True)
    output, other = llm.generate([PROMPT] * 2, [params, free], use_tqdm=False)
    assert time.monotonic() - start < SECONDS
    assert len(other["token_ids"]) == 20 and other["finish_reason"] == "length"
    assert not llm.engine.has_unfinished
    return output


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(llm: LLM, name: str) -> None:
    given, reason = REFUSED[name]
    output = ended(llm, given)
    assert output["finish_reason"] == "error" and not output["token_ids"]
    (form,) = given
    assert output["error"].startswith(f"structured_outputs.{form} is refused: ")
    assert re.search(reason, output["error"]), output["error"]
    assert len(output["error"]) < 400 and "/work" not in output["error"]


@pytest.mark.parametrize("regex", sorted(ENDING))
def test_it_costs_no_more_than_its_answer(llm: LLM, regex: str) -> None:
    output = ended(llm, {"regex": regex})
    assert output["finish_reason"] in ("stop", "length", "error")
    assert "structured_outputs: " in output.get("error", "structured_outputs: ")


def test_an_answer_that_becomes_too_complex_ends_with_an_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(library.LIMITS, "max_items_in_row", 30)
    output = ended(llm, {"json": wide(40)})
    assert output["finish_reason"] == "error" and output["token_ids"]
    assert output["error"].startswith("structured_outputs: "), output["error"]


def test_what_is_too_long_or_too_deep_is_refused_before_it_is_compiled(llm: LLM) -> None:
    deep: Any = {"type": "null"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    cyclic: dict[str, Any] = {"type": "array"}
    cyclic["items"] = cyclic
    many: Any = {"properties": {}}
    for _ in range(20_000):
        many = {"properties": {"a": many}}
    cases: dict[str, Any] = {
        "has 262145 bytes: at most 262144 are allowed": {"regex": "a" * (2**18 + 1)},
        "choice has [0-9]+ bytes": {"choice": [f"word {i}" for i in range(20_000)]},
        "json has [0-9]+ bytes": {"json": {"enum": ["x" * 300_000]}},
        "at most 64 levels": {"json": deep},
        "is not JSON": {"json": cyclic},
        "recursion": {"json": many},
        "is not JSON: maximum": {"json": "[" * 100_000},
        r"only references within the schema": {"json": {"$ref": "https://a.b/schema.json"}},
        "'x-guidance'": {"json": {"type": "string", "x-guidance": {"lenient": True}}},
        "absolute values are at most": {"json": {"type": "integer", "minimum": 10**30}},
        "must be an object": {"json": {"properties": {"a": 5}}},
    }
    for reason, given in cases.items():
        with pytest.raises(ValueError, match=reason):
            llm.generate(
                PROMPT, SamplingParams(structured_outputs=given, max_tokens=3), use_tqdm=False
            )
    assert not llm.engine.has_unfinished


def test_a_grammar_that_takes_too_long_is_killed(llm: LLM) -> None:
    ended(llm, {"choice": ["a"]})
    (trial, *_) = (one for one in llm.engine._grammars._compiler._trials if one._program.process)
    source = grammar_sandbox.Source("json", json.dumps(wide(4000)))
    before = trial._program.process.pid
    with pytest.raises(ValueError, match=r"longer than 0.01 s to compile .* grammar_timeout_s"):
        trial.run(source, 0.01)
    assert trial._program.process is None
    assert (
        trial.run(grammar_sandbox.Source("regex", "a"), 30.0)
        and trial._program.process.pid != before
    )


def test_compiled_grammars_are_kept_up_to_a_limit(llm: LLM) -> None:
    grammars = llm.engine._grammars
    for text in "abcdeb":
        ended(llm, {"choice": [text]})
    (*_, newest) = grammars._cache.values()
    assert len(grammars._cache) <= 3
    before = newest
    ended(llm, {"choice": ["b"]})
    assert next(reversed(grammars._cache.values())) is before, "it was not compiled again"


def test_closing_an_engine_ends_its_processes() -> None:
    llm = LLM("tiny-qwen3", device="cpu", enforce_eager=True, max_num_seqs=2, max_model_len=64)
    engine = llm.engine
    engine.add_request(PROMPT, SamplingParams(structured_outputs={"choice": ["a"]}))
    while engine._grammars:
        engine.step()
    programs = [one._program for one in engine._grammars._compiler._trials]
    (process,) = (one.process for one in programs if one.process)
    engine.add_request(PROMPT, SamplingParams(structured_outputs={"json": wide(4000)}))
    start = time.monotonic()
    engine.close()
    assert process.poll() is not None and time.monotonic() - start < SECONDS / 2
