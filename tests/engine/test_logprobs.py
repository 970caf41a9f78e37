"""Log-probabilities of answers and prompts equal those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanovllm import LLM
from tests.engines import NUM_TOKENS, greedy, random_prompts, tokens


def hf_logprobs(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return (
            hf_model(torch.tensor([token_ids], device=hf_model.device))
            .logits[0]
            .double()
            .log_softmax(-1)
            .cpu()
        )


def assert_logprobs(
    found: dict[int, float], expected_V: torch.Tensor, token_id: int, num: int
) -> None:
    assert token_id in found and len(found) in (num, num + 1)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    top = expected_V.argsort(descending=True)[:num].tolist()
    assert set(found) == set(top) | {token_id}
    for one, value in found.items():
        assert value == pytest.approx(float(expected_V[one]), abs=1e-3)


def test_logprobs_are_those_of_transformers(llm: LLM, hf_model: Any) -> None:
    """The values come from the model's own logits, also with sampling, penalties and filters."""
    prompts = random_prompts([1, 19, 40, 7, 5], seed=70)
    changes: list[dict[str, Any]] = [
        {},
        {"temperature": 1.5, "seed": 1},
        {"top_k": 5, "temperature": 1.0},
        {},
        {},
    ]
    wanted = [0, 3, 100, 1, None]
    params = [greedy(**{**change, "logprobs": num}) for change, num in zip(changes, wanted)]
    params[3] = greedy(logprobs=1, repetition_penalty=1.9, presence_penalty=1.0, min_tokens=3)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert "logprobs" not in outputs[4] and all(
        "prompt_logprobs" not in output for output in outputs
    )
    for prompt, num, output in list(zip(prompts, wanted, outputs))[:4]:
        expected = hf_logprobs(hf_model, prompt + output["token_ids"])
        assert len(output["logprobs"]) == len(output["token_ids"]) == NUM_TOKENS
        for idx, (token_id, found) in enumerate(zip(output["token_ids"], output["logprobs"])):
            assert_logprobs(found, expected[len(prompt) - 1 + idx], token_id, num or 0)


@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 48}, {"pad_batches": False}], ids=str
)
def test_prompt_logprobs_are_those_of_transformers(
    make_llm: Callable[..., LLM], hf_model: Any, options: dict[str, Any]
) -> None:
    llm = make_llm(**options)
    prompts = random_prompts([1, 2, 19, 64, 99, 189], seed=71)
    params = [greedy(3, prompt_logprobs=num) for num in (0, 1, 5, 2, 3, 0)]
    plain = tokens(llm, prompts, greedy(3))
    # prompts in the prefix cache must be computed again
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == plain
    for prompt, one, output in zip(prompts, params, outputs):
        expected = hf_logprobs(hf_model, prompt)
        assert (
            len(output["prompt_logprobs"]) == len(prompt) and output["prompt_logprobs"][0] is None
        )
        for idx in range(1, len(prompt)):
            assert_logprobs(
                output["prompt_logprobs"][idx],
                expected[idx - 1],
                prompt[idx],
                one.prompt_logprobs or 0,
            )


def test_prompt_logprobs_in_graph_mode_beside_others(graph_llm: LLM, hf_model: Any) -> None:
    prompts = random_prompts([99, 40, 19], seed=72)
    outputs = graph_llm.generate(
        prompts, [greedy(), greedy(prompt_logprobs=2, logprobs=2), greedy()], use_tqdm=False
    )
    expected = hf_logprobs(hf_model, prompts[1])
    for idx in range(1, 40):
        assert_logprobs(outputs[1]["prompt_logprobs"][idx], expected[idx - 1], prompts[1][idx], 2)
    assert all("prompt_logprobs" not in outputs[idx] for idx in (0, 2))


def test_logprobs_survive_preemption(make_llm: Callable[..., LLM], hf_model: Any) -> None:
    llm = make_llm(num_kvcache_blocks=1 + 8, max_model_len=128)
    prompts = random_prompts([19, 20, 21, 22], seed=73)
    outputs = llm.generate(prompts, greedy(50, logprobs=2, prompt_logprobs=1), use_tqdm=False)
    assert llm.engine.scheduler.num_preemptions > 0
    for prompt, output in zip(prompts, outputs):
        expected = hf_logprobs(hf_model, prompt + output["token_ids"])
        for idx, (token_id, found) in enumerate(zip(output["token_ids"], output["logprobs"])):
            assert_logprobs(found, expected[len(prompt) - 1 + idx], token_id, 2)
        for idx in range(1, len(prompt)):
            assert_logprobs(output["prompt_logprobs"][idx], expected[idx - 1], prompt[idx], 1)
