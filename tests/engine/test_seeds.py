"""The same seed gives the same tokens in every batch; filters and penalties work in the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.engines import NUM_TOKENS, Generate, assert_all_free, greedy, random_prompts, tokens

SEEDED = [
    SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, seed=7, ignore_eos=True),
    SamplingParams(temperature=0.7, max_tokens=NUM_TOKENS, seed=-(2**63), ignore_eos=True),
    SamplingParams(temperature=1.5, max_tokens=NUM_TOKENS, seed=8, top_k=40, ignore_eos=True),
    SamplingParams(
        temperature=1.5, max_tokens=NUM_TOKENS, seed=9, top_p=0.9, min_p=0.01, ignore_eos=True
    ),
    SamplingParams(
        temperature=1.2,
        max_tokens=NUM_TOKENS,
        seed=2**63 - 1,
        repetition_penalty=1.3,
        ignore_eos=True,
    ),
    SamplingParams(
        temperature=1.2, max_tokens=NUM_TOKENS, seed=3, frequency_penalty=0.5, ignore_eos=True
    ),
]


@pytest.fixture(scope="module")
def seeded_prompts() -> list[list[int]]:
    return random_prompts([1, 19, 16, 48, 33, 99], seed=40)


@pytest.fixture(scope="module")
def seeded_tokens(shared_llm: LLM, seeded_prompts: list[list[int]]) -> list[list[int]]:
    return [
        tokens(shared_llm, [prompt], params)[0] for prompt, params in zip(seeded_prompts, SEEDED)
    ]


def test_same_seed_same_tokens_alone_and_among_others(
    llm: LLM, seeded_prompts: list[list[int]], seeded_tokens: list[list[int]]
) -> None:
    alone = [tokens(llm, [prompt], params)[0] for prompt, params in zip(seeded_prompts, SEEDED)]
    assert alone == seeded_tokens
    assert tokens(llm, seeded_prompts, SEEDED) == seeded_tokens
    others = random_prompts([5] * 31, seed=41)
    crowd = [SamplingParams(max_tokens=1 + i % 20, temperature=i / 10) for i in range(31)]
    found = tokens(
        llm, others[:17] + seeded_prompts + others[17:], crowd[:17] + SEEDED + crowd[17:]
    )
    assert found[17:-14] == seeded_tokens


def test_same_seed_same_tokens_in_a_batch_of_plain_requests(llm: LLM) -> None:
    """No request needs more than the step's own sampler; rows and positions vary."""
    prompts = random_prompts([1, 19, 16, 33, 5, 7, 40], seed=48)
    params = [
        SamplingParams(
            temperature=0.5 + idx / 4, max_tokens=NUM_TOKENS + idx, seed=idx, ignore_eos=True
        )
        for idx in range(len(prompts))
    ]
    alone = [tokens(llm, [prompt], one)[0] for prompt, one in zip(prompts, params)]
    assert tokens(llm, prompts, params) == alone
    assert tokens(llm, prompts[::-1], params[::-1]) == alone[::-1]
    others = [SamplingParams(max_tokens=1 + i % 20, temperature=i / 10) for i in range(30)]
    assert tokens(llm, random_prompts([5] * 30, seed=49) + prompts, others + params)[30:] == alone


@pytest.mark.parametrize("buckets", [(1,), (2, 3), (64,)], ids=str)
def test_same_seed_same_tokens_in_every_bucket(
    make_llm: Callable[..., LLM],
    seeded_prompts: list[list[int]],
    seeded_tokens: list[list[int]],
    buckets: tuple[int, ...],
) -> None:
    assert tokens(make_llm(graph_batch_sizes=buckets), seeded_prompts, SEEDED) == seeded_tokens
    if buckets == (1,):
        assert tokens(make_llm(pad_batches=False), seeded_prompts, SEEDED) == seeded_tokens


def test_same_seed_same_tokens_after_preemption_and_in_chunks(
    make_llm: Callable[..., LLM], shared_llm: LLM, seeded_prompts: list[list[int]]
) -> None:
    """Restarted requests remember their generated tokens, which penalties need."""
    params = [replace(one, max_tokens=50) for one in SEEDED]
    params += [greedy(50, presence_penalty=1.5, frequency_penalty=1.0, repetition_penalty=1.2)] * 2
    prompts = seeded_prompts + seeded_prompts[1:3]
    expected = tokens(shared_llm, prompts, params)
    llm = make_llm(num_kvcache_blocks=1 + 10, max_model_len=160, max_num_batched_tokens=32)
    assert tokens(llm, prompts, params) == expected
    assert llm.engine.scheduler.num_preemptions > 0
    assert_all_free(llm)


def test_different_seeds_differ_and_no_seed_is_a_seed_per_request(
    make_llm: Callable[..., LLM],
) -> None:
    (prompt,) = random_prompts([9], seed=43)
    seeded = [
        SamplingParams(max_tokens=20, seed=seed, ignore_eos=True) for seed in (0, 1, 2**32, -2)
    ]
    unseeded = [SamplingParams(max_tokens=20, ignore_eos=True)] * 4
    first, again, other = make_llm(seed=5), make_llm(seed=5), make_llm(seed=6)
    found = tokens(first, [prompt] * 8, seeded + unseeded)
    assert len(set(map(tuple, found))) == 8
    assert tokens(again, [prompt] * 8, seeded + unseeded) == found
    elsewhere = tokens(other, [prompt] * 8, seeded + unseeded)
    assert elsewhere[:4] == found[:4]
    assert not {tuple(t) for t in elsewhere[4:]} & {tuple(t) for t in found[4:]}


def test_n_answers_have_their_own_seeds(eager_llm: LLM) -> None:
    (prompt,) = random_prompts([20], seed=44)
    params = SamplingParams(max_tokens=10, seed=50, n=4, ignore_eos=True)
    (output, greedy_output) = eager_llm.generate(
        [prompt, prompt], [params, greedy(10)], use_tqdm=False
    )
    answers = [one["token_ids"] for one in output["outputs"]]
    assert len({tuple(answer) for answer in answers}) == 4 and output["token_ids"] == answers[0]
    assert len(greedy_output["outputs"]) == 1
    alone = [SamplingParams(max_tokens=10, seed=50 + i, ignore_eos=True) for i in range(4)]
    assert tokens(eager_llm, [prompt] * 4, alone) == answers
    (again,) = eager_llm.generate([prompt], params, use_tqdm=False)
    assert again["outputs"][3]["token_ids"] == answers[3]


def test_filters_that_leave_one_token_are_greedy(llm: LLM, hf_generate: Generate) -> None:
    prompts = random_prompts([5, 19, 33, 40], seed=45)
    only = [
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"temperature": 0, "top_k": 3, "top_p": 0.5},
    ]
    params = [greedy(**{"temperature": 2.0, **change}) for change in only]
    assert tokens(llm, prompts, params) == [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]


def test_a_decode_step_is_recorded_with_filters_and_chooses_as_it_does_op_by_op(
    make_llm: Callable[..., LLM], eager_llm: LLM, captured: list[object]
) -> None:
    llm = make_llm(enforce_eager=False, graph_batch_sizes=[1, 4], max_num_seqs=4)
    prompts = random_prompts([5, 19, 40], seed=48)
    filtered = SamplingParams(
        temperature=1.5, max_tokens=8, seed=5, top_k=40, top_p=0.9, ignore_eos=True
    )
    params = [filtered, greedy(8), replace(filtered, seed=6, top_k=0, min_p=0.05)]
    expected = tokens(eager_llm, prompts, params)
    recorded = len(captured)
    assert [tokens(llm, prompts, params) for _ in range(3)] == [expected] * 3
    assert len(captured) == recorded + 1, "the bucket of 4 rows, when it was first needed"
    assert tokens(llm, prompts, [*params[:2], replace(params[2], logprobs=1)]) == expected
    assert len(captured) == recorded + 2, (
        "without a sampler, for requests that need more than filters"
    )


def test_repetition_penalty_is_that_of_transformers(llm: LLM, hf_model: Any) -> None:
    prompts = random_prompts([19, 40, 64], seed=46)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=hf_model.device)
        out = hf_model.generate(
            ids,
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=1.4,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert tokens(llm, prompts, greedy(30, repetition_penalty=1.4)) == expected


def test_presence_penalty_forbids_repetition_when_logits_are_close(eager_llm: LLM) -> None:
    """Penalties of the largest strength act on generated tokens: fewer of them repeat."""
    prompts = random_prompts([9, 19], seed=47)
    for plain, penalized in zip(
        tokens(eager_llm, prompts, greedy(60)),
        tokens(eager_llm, prompts, greedy(60, frequency_penalty=2.0, presence_penalty=2.0)),
    ):
        assert len(set(penalized)) > len(set(plain))
