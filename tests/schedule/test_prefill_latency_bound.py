"""Chunk sizes from estimated step times, and the measurement of real step times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.platforms import cpu
from nanovllm.runner import warmup
from nanovllm.schedule.prefill_latency_bound import GRAIN, SHORTEST_STEPS, PrefillLatencyBound
from tests.engines import Generate, random_prompts

STALL = PrefillLatencyBound(
    30.0, ((32, 1.0), (128, 1.0), (512, 2.0), (2048, 5.0), (8192, 18.0)), 1e-6
)


def test_a_step_takes_its_bucket_and_its_attention() -> None:
    assert STALL.estimate([(32, 0)]) == pytest.approx(1.0 + 32 * 16e-6)
    assert STALL.estimate([(100, 1000), (29, 0)]) == pytest.approx(
        2.0 + 1e-6 * (100 * 1050 + 29 * 14.5)
    )


@pytest.mark.parametrize("max_ms", [1.5, 4.0, 10.0, 30.0, 100.0])
@pytest.mark.parametrize("start", [0, 989, 16_384, 100_000])
@pytest.mark.parametrize("num_tokens", [1, 19, 100, 2049, 8192])
@pytest.mark.parametrize("before", [[], [(40, 0)], [(99, 7), (1000, 8192)]], ids=str)
@pytest.mark.parametrize("num_left", [0, 989, 100_000])
def test_chunks_stay_within_the_bound_and_are_never_empty_at_first(
    max_ms: float, start: int, num_tokens: int, before: list[tuple[int, int]], num_left: int
) -> None:
    num_tokens = min(num_tokens, 8192 - sum(num for num, _ in before))
    num = STALL.next_chunk(before, (num_tokens, start), max_ms, num_left)
    assert 0 <= num <= num_tokens
    if num and (before or num > 32):
        assert STALL.estimate([*before, (num, start)]) <= max_ms + 1e-9
    assert num or before
    if num < num_tokens and num > 32:
        total = num + sum(one for one, _ in before)
        assert num % GRAIN == 0 or total in dict(STALL.step_ms)


def test_full_buckets_are_taken_rather_than_a_part_of_the_next() -> None:
    assert STALL.next_chunk([], (2100, 0), math.inf) == 2048
    assert STALL.next_chunk([], (8192, 0), math.inf) == 8192
    assert STALL.next_chunk([], (8192, 6000), 30.0) == 2048, (
        "1,700 tokens would fit the bound in the larger bucket"
    )


def test_a_prompt_is_not_cut_at_a_bucket_if_others_fill_the_next() -> None:
    assert STALL.next_chunk([(400, 0)], (300, 0), 30.0) == 512 - 400
    assert STALL.next_chunk([(400, 0)], (300, 0), 30.0, num_left=900) == 300
    assert STALL.next_chunk([(400, 0)], (300, 0), 4.0, num_left=900) == 512 - 400, "too long a step"


@pytest.mark.parametrize("shortest_ms, max_ms", [(0.5, 6.0), (4.5, 54.0), (16.0, 60.0)])
def test_the_default_bound_grows_with_the_model_up_to_the_device_s(
    shortest_ms: float, max_ms: float
) -> None:
    step_ms = ((32, shortest_ms), (128, 20.0))
    assert PrefillLatencyBound(60.0, step_ms, 1e-6).in_proportion() == PrefillLatencyBound(
        max_ms, step_ms, 1e-6
    )


def test_without_attention_the_bucket_alone_counts() -> None:
    free = PrefillLatencyBound(4.0, STALL.step_ms, 0.0)
    assert free.next_chunk([], (8192, 10**6), free.max_ms) == 512


def test_a_bound_is_measured_at_warm_up_and_the_answers_stay(
    make_llm: Callable[..., LLM], hf_generate: Generate
) -> None:
    options: dict[str, Any] = {"max_stall_ms": 0.001, "max_num_batched_tokens": 128}
    llm = make_llm(**options)
    stall = llm.engine.scheduler.stall
    assert stall is not None and stall.max_ms == 0.001
    assert (
        tuple(tokens for tokens, _ in stall.step_ms)
        == llm.engine.runner.layout.prefill_tokens
        == (32, 128)
    )
    times = [ms for _, ms in stall.step_ms]
    assert times == sorted(times) and times[0] > 0 and stall.attention_ms >= 0
    prompts = random_prompts([5, 19, 200], seed=130)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    found: list[list[int]] = [[], [], []]
    for piece in llm.stream(prompts, params):
        found[piece["index"]] += piece["token_ids"]
    assert found == [hf_generate(prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("long_ms, repeats", [(math.inf, 2), (0.0, 1)])
def test_long_steps_are_timed_once_and_no_step_twice_over(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, long_ms: float, repeats: int
) -> None:
    engine = make_llm(max_stall_ms=50, max_num_batched_tokens=128).engine
    monkeypatch.setattr(warmup, "STALL_LONG_MS", long_ms)
    timed: list[int] = []
    prefill_step = engine.runner.buckets.prefill

    def counting(num_tokens: int, num_rows: int) -> Any:
        step = prefill_step(num_tokens, num_rows)

        def replay() -> None:
            timed.append(num_tokens)

        return SimpleNamespace(**vars(step) | {"replay": replay, "fill": step.fill})

    monkeypatch.setattr(engine.runner.buckets, "prefill", counting)
    warmup.measure_prefill_latency_bound(engine.runner, 50)
    assert timed == [32] * repeats + [128] * repeats + [128] * repeats, (
        "the last ones with a long context"
    )


def test_a_bound_that_is_asked_for_is_not_lowered(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "TRAITS", replace(cpu.TRAITS, max_stall_ms=1e6))
    options: list[dict[str, Any]] = [{"max_stall_ms": 1e6}, {}]
    asked, default = (
        make_llm(device="cpu", max_num_batched_tokens=128, **one).engine.scheduler.stall
        for one in options
    )
    assert asked is not None and asked.max_ms == 1e6
    assert default is not None and default.max_ms == SHORTEST_STEPS * default.step_ms[0][1]


def test_no_bound_unless_the_device_has_one_or_it_is_asked_for(
    make_llm: Callable[..., LLM], device: str
) -> None:
    assert make_llm(max_stall_ms=math.inf).engine.scheduler.stall is None
    if device == "cpu":
        assert make_llm().engine.scheduler.stall is None
    engine = make_llm(max_stall_ms=50, pad_batches=False).engine
    assert engine.scheduler.stall is not None
    request_id = engine.add_request([5, 6], incremental=False)
    assert not engine.scheduler.waiting[0].incremental
    engine.abort_all([request_id])
    engine.add_request([5, 6])
    assert engine.scheduler.waiting[0].incremental
