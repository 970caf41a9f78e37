"""Engines that draft, one that does not, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.schedule.plan import StepPlan
from nanovllm.structured import matcher
from nanovllm.structured_params import StructuredOutputsParams
from tests.engines import assert_all_free, greedy, random_prompts

PROMPTS = [
    *random_prompts([19, 1, 40, 99], seed=3),
    random_prompts([7], seed=4)[0] * 5,  # repeats
    random_prompts([3], seed=5)[0] * 30,
]
DRAWN = SamplingParams(temperature=0.9, seed=4, max_tokens=25, ignore_eos=True)
FILTERED = SamplingParams(
    temperature=0.9, top_k=9, top_p=0.9, seed=4, max_tokens=25, ignore_eos=True
)
MIN_P = SamplingParams(temperature=1.5, min_p=0.02, seed=4, max_tokens=25, ignore_eos=True)
MIXED = [
    greedy(25), greedy(9, presence_penalty=1.5), greedy(14, logprobs=2), DRAWN,
    greedy(20, min_tokens=5),
    SamplingParams(temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(
        regex="(ab|cd){3,9}"
    )),
]  # fmt: skip
FREE = SamplingParams(
    temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="[abcd]{9,20}")
)
NGRAM: dict[str, Any] = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "unpadded": {"tuning": {"pad_batches": False}},
    "graph": {"enforce_eager": False, "graph_batch_sizes": (2, 6), "max_num_batched_tokens": 64},
}
ALWAYS: dict[str, Any] = {"tuning": {"adapt_draft_length": False}}


def options(checkpoint: Path, method: str, **values: Any) -> dict[str, Any]:
    """The options of an engine with this method."""
    if method == "ngram":
        return {"speculative_config": {**NGRAM, **values}}
    given = {"method": method, "model": str(checkpoint), "num_speculative_tokens": 3, **values}
    return {"speculative_config": given}


@pytest.fixture(autouse=True)
def grammars_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is: slow ones have no drafts."""
    monkeypatch.setattr(matcher, "SLOW_S", 1e9)


@pytest.fixture(scope="module")
def plain(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    llm = make_llm(max_num_seqs=6, device="cpu")
    yield llm
    llm.close()


@pytest.fixture(scope="module", params=MODES)
def looking_up(
    request: pytest.FixtureRequest, checkpoint: Path, make_llm: Callable[..., LLM]
) -> Iterator[LLM]:
    mode = MODES[request.param]
    tuning = {"run_ahead": 1, "adapt_draft_length": False, **mode.get("tuning", {})}
    spec = options(checkpoint, "ngram")
    llm = make_llm(max_num_seqs=6, device="cpu", **{**mode, **spec, "tuning": tuning})
    yield llm
    assert_all_free(llm)
    llm.close()


def watch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepPlan, int]]:
    """The plans that the runner gets, each with the number of steps whose results are unknown."""
    engine, seen = llm.engine, []
    launch = engine.runner.launch

    def noting(plan: StepPlan) -> Any:
        seen.append((plan, len(engine._in_flight)))
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", noting)
    return seen
