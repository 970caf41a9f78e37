"""Ranks, and log-probabilities of the whole vocabulary, in the results of steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM
from nanovllm.schedule.plan import ALL_TOKENS, Logprobs, StepPlan, StepResult
from tests.engines import VOCAB_SIZE, greedy, random_prompts


def assert_of(found: Logprobs, expected_NV: torch.Tensor, token_ids: list[int]) -> None:
    sorted_NV, _ = expected_NV.sort(descending=True)
    chosen_N = expected_NV[torch.arange(len(token_ids)), token_ids]
    np.testing.assert_allclose(found.chosen_N, chosen_N, atol=1e-3)
    np.testing.assert_allclose(found.top_NL, sorted_NV, atol=1e-3)
    assert np.array_equal(np.sort(found.top_token_NL, axis=1)[0], np.arange(VOCAB_SIZE))
    rank_N = (expected_NV > chosen_N[:, None]).sum(-1) + 1
    assert found.rank_N.tolist() == rank_N.tolist()


def test_rank_and_all_logprobs_are_those_of_transformers(
    eager_llm: LLM, hf_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row asks for two tokens and the other for all: the step reports all for both."""
    engine = eager_llm.engine
    launch, collect = engine.runner.launch, engine._answers.collect
    results: list[tuple[StepPlan, StepResult]] = []

    def asking(plan: StepPlan) -> Any:
        wanted = [one._replace(num_top=ALL_TOKENS) for one in plan.prompt_logprobs]
        sampling = replace(plan.sampling, num_logprobs=ALL_TOKENS)
        return launch(replace(plan, sampling=sampling, prompt_logprobs=wanted))

    def keep(plan: StepPlan, result: StepResult) -> None:
        results.append((plan, result))
        collect(plan, result)

    monkeypatch.setattr(engine.runner, "launch", asking)
    monkeypatch.setattr(engine._answers, "collect", keep)
    (prompt,) = random_prompts([19], seed=31)
    params = greedy(5, logprobs=2, prompt_logprobs=1, temperature=1.5, seed=2)
    (output,) = eager_llm.generate([prompt], params, use_tqdm=False)
    known = prompt + output["token_ids"]
    with torch.no_grad():
        logits_TV = hf_model(torch.tensor([known], device=hf_model.device)).logits[0].float().cpu()
    expected_TV = logits_TV.log_softmax(-1)
    (_, first), *_ = results
    assert_of(first.prompt_logprobs[0], expected_TV[:18], prompt[1:])
    for place, (_, result) in enumerate(results):
        assert result.logprobs is not None
        token_ids = [known[19 + place]]
        assert_of(result.logprobs, expected_TV[18 + place : 19 + place], token_ids)
