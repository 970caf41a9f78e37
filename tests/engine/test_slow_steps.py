"""A machine that has become slow says so once; one that hiccups does not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from nanovllm import LLM
from nanovllm.engine import engine as engine_module
from nanovllm.engine import step_watch
from nanovllm.engine.step_watch import EVERY_STEPS, NUM_TIMED, StepWatch
from nanovllm.schedule.pace import HOST_MS, DecodePace
from nanovllm.schedule.plan import StepPlan
from tests.engines import greedy, tokens

PACE = DecodePace(((1, 8.0), (9, 16.0)), token_share=0.01, spread=2.0)
LIMIT_S = (HOST_MS + 2 * 12.0 * 11.0) / 100  # ten times what five rows with 100 tokens may take


def plan(num_rows: int = 5, *, is_prefill: bool = False) -> StepPlan:
    rows = list(range(num_rows))
    return StepPlan(
        is_prefill, rows, rows, [1] * num_rows, [100 // num_rows] * num_rows,
        np.empty(0, np.int64), [True] * num_rows,
    )  # fmt: skip


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.message for one in caplog.records if "as long as at warm-up" in one.message]


def test_the_expected_time_follows_from_rows_tokens_and_experts() -> None:
    assert PACE.most_ms(5, 100) == pytest.approx(100 * LIMIT_S)
    assert PACE.most_ms(1, 0) == HOST_MS + 16 and PACE.most_ms(99, 0) == HOST_MS + 32
    assert DecodePace(((4, 3.0),)).most_ms(4, 9) == HOST_MS + 3


@pytest.mark.parametrize("num_slow", [0, 1, 7])
def test_some_slow_steps_are_no_slow_machine(
    num_slow: int, caplog: pytest.LogCaptureFixture
) -> None:
    watch = StepWatch(PACE)
    for i in range(4 * NUM_TIMED):
        watch.note(100.0 if i % NUM_TIMED < num_slow else 0.9 * LIMIT_S, plan(), plan())
    assert not warnings(caplog)


def test_a_slow_machine_is_said_once_with_its_causes(caplog: pytest.LogCaptureFixture) -> None:
    watch = StepWatch(PACE)
    for _ in range(4 * NUM_TIMED):
        watch.note(1.2 * LIMIT_S, plan(), plan())
    (text,) = warnings(caplog)
    assert "decode steps take 12 times as long" in text
    assert all(
        cause in text for cause in ("other processes", "swapped out", "heat", "load average")
    )


def test_only_plain_decode_steps_count(caplog: pytest.LogCaptureFixture) -> None:
    watch = StepWatch(PACE)
    for _ in range(4 * NUM_TIMED):
        watch.note(100.0, plan(), plan(is_prefill=True))
        watch.note(100.0, plan(is_prefill=True), plan())
        watch.note(100.0, None, plan())
    assert not warnings(caplog)


def test_an_engine_times_some_of_its_steps_and_warns(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(max_model_len=512, num_kvcache_blocks=65)
    watch = llm.engine._step_watch  # type: ignore[attr-defined]
    rows = llm.engine.runner.layout.decode_rows  # type: ignore[attr-defined]
    assert [num for num, _ in watch._pace.step_ms] == sorted({rows[0], rows[-1]})
    assert all(ms > 0 for _, ms in watch._pace.step_ms)
    reads = count()
    clock = SimpleNamespace(perf_counter=lambda: 3600.0 * next(reads))
    monkeypatch.setattr(engine_module, "time", clock)
    num_steps = EVERY_STEPS * (NUM_TIMED + 1)
    with caplog.at_level(logging.WARNING, step_watch.logger.name):
        tokens(llm, [[5, 6, 7]], greedy(num_steps))
        assert len(warnings(caplog)) == 1
        assert next(reads) <= 2 * num_steps / EVERY_STEPS + 6
        tokens(llm, [[5, 6, 7]], greedy(num_steps))
    assert len(warnings(caplog)) == 1
