"""A request's tokens depend only on the request.

Neighbours, buckets, chunks, cache hits and preemptions change nothing. Greedy tokens in fp32 are
compared with transformers' generate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.compile.lower import eager, inductor
from nanovllm.platforms.base import MemoryBudget
from tests.engines import VOCAB_SIZE, Generate, assert_all_free, random_prompts, tokens

BLOCK = 16
NUM_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LENGTHS = [1, 2, 5, 15, 16, 17, 19, 31, 32, 33, 48, 64, 99, 100, 128, 189]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """37 prompts, with odd lengths, exact multiples of the block, repeats and shared prefixes."""
    base = random_prompts(LENGTHS)
    shared = [base[12][:64] + tail for tail in random_prompts([1, 7, 16], seed=1)]
    return base + shared + random_prompts([3, 11, 40] * 5, seed=2) + [base[11], base[11], base[3]]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]], hf_generate: Generate) -> list[list[int]]:
    assert len(prompts) == 37
    return [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]


def test_alone(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
    picked = range(0, len(prompts), 4)
    assert [tokens(llm, [prompts[i]], GREEDY)[0] for i in picked] == [expected[i] for i in picked]


def test_batch_of_37_needs_several_decode_steps(
    llm: LLM, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert tokens(llm, prompts, GREEDY) == expected


@pytest.mark.parametrize("num", [2, 3, 5, 6, 17])
def test_batch_sizes_that_are_no_bucket(
    llm: LLM, prompts: list[list[int]], expected: list[list[int]], num: int
) -> None:
    assert tokens(llm, prompts[:num], GREEDY) == expected[:num]


def test_prefix_cache_hits(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
    tokens(llm, prompts, GREEDY)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected
    # all full blocks except the block with the prompt's last token
    assert [output["num_cached_tokens"] for output in outputs] == [
        (len(p) - 1) // BLOCK * BLOCK for p in prompts
    ]


def test_whole_prompt_in_the_cache_at_an_exact_multiple_of_the_block(
    eager_llm: LLM, hf_generate: Generate
) -> None:
    for num_blocks in (1, 2, 4):
        (prompt,) = random_prompts([num_blocks * BLOCK], seed=100 + num_blocks)
        tokens(eager_llm, [prompt], GREEDY)
        (output,) = eager_llm.generate([prompt], GREEDY, use_tqdm=False)
        assert output["num_cached_tokens"] == (num_blocks - 1) * BLOCK
        assert output["token_ids"] == hf_generate(prompt, NUM_TOKENS)


def test_answers_are_prefixes_too(eager_llm: LLM, hf_generate: Generate) -> None:
    """A second turn finds the full blocks of the first turn's answer in the cache."""
    (prompt,) = random_prompts([30], seed=7)
    answer = tokens(eager_llm, [prompt], GREEDY)[0]
    (output,) = eager_llm.generate([prompt + answer + [9]], GREEDY, use_tqdm=False)
    # the last token of an answer is never an input
    assert output["num_cached_tokens"] == (len(prompt) + len(answer) - 1) // BLOCK * BLOCK == 48
    assert output["token_ids"] == hf_generate(prompt + answer + [9], NUM_TOKENS)


def test_same_prompt_twice_in_one_prefill_step(llm: LLM, hf_generate: Generate) -> None:
    (prompt,) = random_prompts([70], seed=11)
    outputs = llm.generate([prompt, prompt, prompt], GREEDY, use_tqdm=False)
    assert [output["num_cached_tokens"] for output in outputs] == [0, 64, 64]
    assert [output["token_ids"] for output in outputs] == [hf_generate(prompt, NUM_TOKENS)] * 3


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_chunked_prefill(
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    expected: list[list[int]],
    enforce_eager: bool,
) -> None:
    # the same decode buckets as the shared engine: only one more prefill bucket to compile
    llm = make_llm(
        max_num_batched_tokens=48, enforce_eager=enforce_eager, graph_batch_sizes=(1, 5, 16)
    )
    assert tokens(llm, prompts, GREEDY) == expected
    assert tokens(llm, prompts, GREEDY) == expected
    assert_all_free(llm)


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
def test_preempted_and_restarted(
    make_llm: Callable[..., LLM], prompts: list[list[int]], expected: list[list[int]], caching: bool
) -> None:
    llm = make_llm(num_kvcache_blocks=18, max_num_batched_tokens=64, enable_prefix_caching=caching)
    for _ in range(2):
        before = llm.engine.scheduler.num_preemptions
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected
        assert llm.engine.scheduler.num_preemptions > before
        assert any(output["num_cached_tokens"] for output in outputs) == caching
        assert_all_free(llm)


def test_preempted_in_graph_mode(
    make_llm: Callable[..., LLM], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    llm = make_llm(num_kvcache_blocks=18, enforce_eager=False, graph_batch_sizes=(1, 5, 16))
    assert tokens(llm, prompts, GREEDY) == expected
    assert llm.engine.scheduler.num_preemptions > 0
    assert_all_free(llm)


def test_preemption_meets_prefix_hits(make_llm: Callable[..., LLM], hf_generate: Generate) -> None:
    """Preempted requests with a shared prefix find it again when they restart."""
    (start,) = random_prompts([64], seed=21)
    prompts = [start + tail for tail in random_prompts([5, 6, 7, 8, 9, 10], seed=22)]
    llm = make_llm(num_kvcache_blocks=1 + 16)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert llm.engine.scheduler.num_preemptions > 0
    assert [output["num_cached_tokens"] for output in outputs[1:]] == [64] * 5
    assert [output["token_ids"] for output in outputs] == [
        hf_generate(prompt, 60) for prompt in prompts
    ]
    assert_all_free(llm)


def test_every_request_may_be_the_only_one_of_its_decode_step(
    make_llm: Callable[..., LLM], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """One row per step, full cache: the newest request needs a block and is itself preempted."""
    llm = make_llm(
        graph_batch_sizes=(1,), num_kvcache_blocks=18, max_num_seqs=5, enable_prefix_caching=False
    )
    assert tokens(llm, prompts, GREEDY) == expected
    assert llm.engine.scheduler.num_preemptions > 0
    assert_all_free(llm)


def test_one_long_request_fills_the_cache_to_its_last_block(
    make_llm: Callable[..., LLM], hf_generate: Generate
) -> None:
    llm = make_llm(num_kvcache_blocks=1 + 4, max_model_len=4 * BLOCK)
    (prompt, other) = random_prompts([33, 20], seed=31)
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output["finish_reason"] == "length" and output["token_ids"] == hf_generate(
        prompt, 4 * BLOCK - 33
    )
    both = llm.generate([prompt, other], params, use_tqdm=False)
    assert [o["token_ids"] for o in both] == [hf_generate(prompt, 31), hf_generate(other, 44)]
    assert_all_free(llm)


def test_max_model_len_is_lowered_to_what_the_cache_holds(
    make_llm: Callable[..., LLM], hf_generate: Generate
) -> None:
    llm = make_llm(num_kvcache_blocks=1 + 4, max_model_len=None)
    assert llm.engine.max_model_len == 4 * BLOCK
    (prompt,) = random_prompts([33], seed=31)
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    assert tokens(llm, [prompt], params) == [hf_generate(prompt, 31)]


def test_programs_fit_the_lowered_max_model_len(
    make_llm: Callable[..., LLM],
    hf_generate: Generate,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    """Programs for the longer block tables of measuring are not used with shorter tables."""

    def lower(graph: Any, fakes: Sequence[torch.Tensor]) -> Callable[..., Sequence[torch.Tensor]]:
        run = eager.lower(graph, fakes)

        def checked(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
            for tensor, fake in zip(inputs, fakes):
                assert all(
                    a == b for a, b in zip(tensor.shape, fake.shape) if isinstance(b, int)
                ), "other shapes"
            return run(*inputs)

        return checked

    monkeypatch.setattr(inductor, "lower", lower)
    platform = type(platforms.select(device))
    block_bytes = 2 * 2 * 2 * 32 * 4 * BLOCK  # keys and values, layers, heads, head size, fp32
    monkeypatch.setattr(
        platform, "memory_budget", lambda *_: MemoryBudget(6 * block_bytes, block_bytes - 100)
    )
    llm = make_llm(
        enforce_eager=False, num_kvcache_blocks=None, max_model_len=None, graph_batch_sizes=(2,)
    )
    assert llm.engine.max_model_len == 4 * BLOCK
    prompts = random_prompts([33, 5], seed=31)
    assert tokens(llm, prompts, GREEDY) == [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]


def test_eager_without_padding(
    make_llm: Callable[..., LLM], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    llm = make_llm(pad_batches=False)
    assert tokens(llm, prompts, GREEDY) == expected
    assert tokens(llm, prompts, GREEDY) == expected


@pytest.mark.parametrize("block_size", [32, 64])
def test_block_sizes(
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    expected: list[list[int]],
    block_size: int,
) -> None:
    llm = make_llm(kvcache_block_size=block_size, num_kvcache_blocks=100)
    assert tokens(llm, prompts, GREEDY) == expected


@pytest.mark.parametrize("buckets", [(16,), (2, 3), (37,), (64,), None], ids=str)
def test_other_buckets(
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    expected: list[list[int]],
    buckets: tuple[int, ...] | None,
) -> None:
    llm = make_llm(graph_batch_sizes=buckets)
    assert tokens(llm, prompts, GREEDY) == expected
    assert tokens(llm, prompts[:4], GREEDY) == expected[:4]
    assert_all_free(llm)


def test_graph_with_one_bucket(
    make_llm: Callable[..., LLM], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    llm = make_llm(enforce_eager=False, graph_batch_sizes=(16,))
    assert tokens(llm, prompts, GREEDY) == expected
    assert tokens(llm, prompts[:4], GREEDY) == expected[:4]


def test_requests_that_come_and_go(
    llm: LLM, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """New requests arrive every few steps, with different lengths of answers."""
    engine = llm.engine
    wanted: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    waiting = list(zip(prompts, expected))
    for step_idx in range(10_000):
        if waiting and step_idx % 3 == 0:
            prompt, answer = waiting.pop()
            length = 1 + len(waiting) % NUM_TOKENS
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            wanted[engine.add_request(prompt, params)] = answer[:length]
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
        if not waiting and not engine.has_unfinished:
            break
    assert found == wanted and len(found) == len(prompts)


# padding ------------------------------------------------------------------------------------------


def poison(llm: LLM) -> None:
    """Write NaN to every slot of the cache, which no request owns, and forget cached prefixes."""
    scheduler = llm.engine.scheduler
    assert not scheduler.has_work
    scheduler.cache.pool.reset()
    with torch.no_grad():
        for cache in llm.engine.runner.steps.caches:
            cache.k_CBKH.fill_(float("nan"))
            cache.v_CBKH.fill_(float("nan"))


def test_padding_and_unowned_blocks_are_never_read(
    llm: LLM, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    poison(llm)
    assert tokens(llm, prompts[:6], GREEDY) == expected[:6]
    poison(llm)
    assert tokens(llm, prompts, GREEDY) == expected
    poison(llm)
    assert tokens(llm, prompts[12:13], GREEDY) == expected[12:13]


def test_padding_block_full_of_nan_in_the_middle_of_generation(
    llm: LLM, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine = llm.engine
    ids = {
        engine.add_request(prompt, GREEDY): answer for prompt, answer in zip(prompts[:6], expected)
    }
    found: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while engine.has_unfinished:
        with torch.no_grad():
            for cache in engine.runner.steps.caches:
                cache.k_CBKH[0] = float("nan")
                cache.v_CBKH[0] = float("nan")
        for output in engine.step():
            found[output.request_id] += output.token_ids
    assert found == ids


def test_nan_in_the_padding_row_of_the_state(
    llm: LLM, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    state = llm.engine.runner.state
    state.sampling_SF[state.pad_row] = float("nan")
    try:
        assert tokens(llm, prompts[:6], GREEDY) == expected[:6]
        assert state.token_S[state.pad_row] == 0 and state.pos_S[state.pad_row] == 0
    finally:
        state.sampling_SF[state.pad_row] = 0.0


def test_vocabulary_covers_all_prompts(prompts: list[list[int]]) -> None:
    assert all(0 <= token_id < VOCAB_SIZE for prompt in prompts for token_id in prompt)
