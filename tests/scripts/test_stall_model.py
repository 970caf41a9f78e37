"""The model of the scheduler under load: the times that it adds up, and what it is used for."""

from __future__ import annotations

import pytest

from scripts.bench.stall_model import (
    COSTS,
    Arrival,
    Costs,
    Trace,
    bench_load,
    new_scheduler,
    simulate,
)

TINY = Costs({32: 2.0, 128: 3.0}, 1e-3, {1: 4.0, 8: 5.0}, 1e-2, {1: 0.5, 3: 1.0})


def streamed(costs: Costs, arrivals: list[Arrival], max_ms: float | None) -> Trace:
    return simulate(new_scheduler(costs, max_ms, 256), costs, arrivals, streamed=True)


def test_steps_of_a_request_follow_each_other_on_the_device() -> None:
    (times,) = streamed(TINY, [Arrival(7.0, 100, 3)], None).token_ms
    prefill_ms = 3.0 + 1e-3 * 100 * 50
    assert times[0] == pytest.approx(7.0 + 0.05 + 0.0025 + prefill_ms)
    assert times[1] - times[0] == pytest.approx(4.0 + 1e-2 * 101 / 0.5)
    assert times[2] - times[1] == pytest.approx(4.0 + 1e-2 * 102 / 0.5)


def test_rows_of_a_step_share_it() -> None:
    trace = streamed(TINY, [Arrival(0.0, 20, 2)] * 2, None)
    assert trace.prefill_ms == [pytest.approx(3.0 + 2e-3 * 20 * 10)], "40 tokens, a bucket of 128"
    assert trace.decode_ms == [pytest.approx(5.0 + 1e-2 * 42 / 0.75)]
    assert trace.summary()["gap_ms_worst"] == pytest.approx(trace.decode_ms[0], abs=0.01)


def test_the_offline_speed_of_8b_is_near_the_measured_one() -> None:
    costs, load = COSTS["Qwen3-8B"], bench_load()
    trace = simulate(new_scheduler(costs, None, 256), costs, load, streamed=False)
    assert trace.summary()["tokens_per_second"] == pytest.approx(10_120, rel=0.02)


def test_the_default_bound_has_fewer_steps_of_few_rows_than_30_ms_for_8b() -> None:
    costs, load = COSTS["Qwen3-8B"], bench_load(48)
    default, short = streamed(costs, load, None), streamed(costs, load, 30.0)
    assert len(default.prefill_ms) < 0.7 * len(short.prefill_ms)
    assert sum(default.decode_ms) < sum(short.decode_ms)
    assert max(short.prefill_ms[1:]) <= 30 < max(default.prefill_ms[1:]) <= 60, (
        "nobody streams during the first step"
    )
