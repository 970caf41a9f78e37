"""Engines whose options name a proposer answer as engines without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.speculative import SpeculativeConfig
from tests.engines import assert_all_free, greedy, random_prompts, tokens

PROMPTS = random_prompts([19, 1, 40, 99, 7], seed=3)
DRAWN = SamplingParams(temperature=0.9, seed=4, max_tokens=25, ignore_eos=True)


def options(checkpoint: Path, method: str, **values: Any) -> dict[str, Any]:
    """The options of an engine with this method."""
    given: dict[str, Any] = {"method": method, "num_speculative_tokens": 3, **values}
    if "model" in SpeculativeConfig.of({**given, "model": str(checkpoint)}).given:
        given["model"] = str(checkpoint)
    return {"speculative_config": given}


@pytest.fixture(scope="module")
def plain(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    llm = make_llm(max_num_seqs=6, device="cpu")
    yield llm
    llm.close()


def test_two_ranks_draft_the_same(checkpoint: Path, make_llm: Callable[..., LLM], plain: LLM,
                                  bare_store: Path) -> None:  # fmt: skip
    spec = options(checkpoint, "draft_model")
    llm = make_llm(device="cpu", tensor_parallel_size=2, compile_cache=str(bare_store), **spec)
    for params in (greedy(25), DRAWN):
        before = llm.engine.metrics.num_steps
        assert tokens(llm, PROMPTS, params) == tokens(plain, PROMPTS, params)
        assert llm.engine.metrics.num_steps - before < 20, "equal models agree on every token"
    assert_all_free(llm)
    llm.close()


def test_replicas_draft(checkpoint: Path, make_llm: Callable[..., LLM], plain: LLM,
                        bare_store: Path) -> None:  # fmt: skip
    spec = options(checkpoint, "draft_model")
    llm = make_llm(device="cpu", data_parallel_size=2, compile_cache=str(bare_store), **spec)
    assert tokens(llm, PROMPTS, greedy(25)) == tokens(plain, PROMPTS, greedy(25))
    steps = [one.value for one in llm.get_metrics() if one.name.endswith("num_steps")]
    assert sum(steps) < 40, "four tokens a step in each of the replicas"
    llm.close()
