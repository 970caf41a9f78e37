"""Answers at temperature 2 are what their JSON schemas ask for, for 300 schemas of all features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from nanovllm import LLM, SamplingParams
from tests.structured.schemas import FEATURES, UNSUPPORTED, schemas

NUM_SCHEMAS = 300
PROMPT = "What is 2 + 3?"
# answers with strings and recursion may go on; all others must have ended by then
MAX_TOKENS = 96
MAX_UNFINISHED = 30


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"device": "cpu", "enforce_eager": True}, id="cpu"),
        pytest.param({"device": "cuda"}, id="cuda", marks=pytest.mark.gpu),
    ],
)
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    llm = LLM(
        "tiny-qwen3", max_num_seqs=100, max_model_len=256, num_kvcache_blocks=1200,
        kvcache_block_size=16, max_cached_grammars=2, **request.param,
    )  # fmt: skip
    yield llm
    llm.close()


def params(schema: Any, seed: int, **changes: Any) -> SamplingParams:
    fields: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 2.0, "seed": seed}
    return SamplingParams(structured_outputs={"json": schema}, **{**fields, **changes})


def test_every_finished_answer_is_valid(llm: LLM) -> None:
    asked = list(schemas(NUM_SCHEMAS))
    found = llm.generate(
        [PROMPT] * len(asked),
        [params(schema, seed) for seed, schema in enumerate(asked)],
        use_tqdm=False,
    )
    num_valid: dict[str, int] = {feature.__name__: 0 for feature in FEATURES}
    unfinished = 0
    for number, (schema, output) in enumerate(zip(asked, found, strict=True)):
        assert output["finish_reason"] in ("stop", "length"), (schema, output["error"])
        if output["finish_reason"] == "length":
            unfinished += 1
            continue
        checker = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        checker.validate(json.loads(output["text"]))
        num_valid[FEATURES[number % len(FEATURES)].__name__] += 1
    assert unfinished <= MAX_UNFINISHED, f"{unfinished} answers have not ended"
    assert all(num_valid.values()), f"no answer has ended: {num_valid}"


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_unsupported_keywords_are_refused_by_name(llm: LLM, keyword: str) -> None:
    schema = UNSUPPORTED[keyword]
    for place in (schema, {"type": "array", "items": {"anyOf": [{"type": "null"}, schema]}}):
        with pytest.raises(ValueError, match=r"this keyword is not supported") as error:
            llm.generate(PROMPT, params(place, 0))
        named = str(error.value).split("'")[1]
        assert named in (keyword, "contains", "then", "else"), error.value
    assert not llm.engine.has_unfinished
