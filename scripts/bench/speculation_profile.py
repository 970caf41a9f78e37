"""The kernels of one captured speculative step, and the bytes that they must move.

`speculation.py --profile` uses it. The step runs while no request does: rows are given made-up
positions, and no request has what it writes to the cache.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from nanovllm.engine.engine import Engine
from nanovllm.runner.device_graphs import DecodeStep, VerifyStep
from nanovllm.runner.runner import Runner
from nanovllm.schedule.plan import DRAFT, NEWEST
from nanovllm.tools.device_limits import measure_limits
from nanovllm.tools.kernel_table import Launch, as_text, kernel_table, read_kernels, read_launches
from nanovllm.tools.profile import OpBytes

REPEATS = 8
FREE_BYTES = 2.0**30  # for measuring the bandwidth: the cache has most of the memory


def profile_steps(engine: Engine, num_rows: int, context: int) -> list[dict[str, Any]]:
    """Profile the plain step of `num_rows` rows and the largest one that verifies drafts, on
    `context` tokens of each row. Prints their tables."""
    runner = engine.runner
    assert isinstance(runner, Runner)
    platform, cfg = runner.platform, runner.cfg
    limits = measure_limits(platform.device, cfg.dtype, platform.synchronize, FREE_BYTES)
    reports = []
    for num in (1, *runner.layout.verify_tokens[-1:]):
        with torch.no_grad():
            report = _profiled(runner, _filled(runner, num_rows, num), num_rows, num, context)
        table = kernel_table(*report.pop("found"), REPEATS, limits.bandwidth)
        reports.append({**report, **table})
        print(f"{num - 1} drafts; {as_text(reports[-1])}\n")
    return reports


def _filled(runner: Runner, num_rows: int, num: int) -> DecodeStep | VerifyStep:
    """The step of the first rows, which feed `num` tokens each."""
    rows = list(range(num_rows))
    if num == 1:
        plain = runner.buckets.decode(num_rows, rests=runner.rests)
        plain.fill(rows)
        return plain
    step = runner.buckets.verify(num_rows, num)
    token_ids = np.array([NEWEST, *[DRAFT] * (num - 1)] * num_rows)
    nums = [num] * num_rows
    step.fill(runner.buckets.span_arrays(rows, nums, token_ids, num * num_rows, num_rows))
    return step


def _profiled(
    runner: Runner, step: DecodeStep | VerifyStep, num_rows: int, num: int, context: int
) -> dict[str, Any]:
    """found: the arguments of `kernel_table`. wall_us: microseconds of a step."""

    def place() -> None:
        runner.state.pos_S[:num_rows] = context
        runner.state.token_S[:num_rows] = 1

    def again() -> None:
        for _ in range(REPEATS):
            step.replay()

    place()
    mode = OpBytes([context + num] * num_rows)
    with mode:  # loads what only steps that are not captured need
        step.launch()
    place()

    def op_by_op() -> None:
        with mode:
            step.launch()

    mode.ops.clear()
    by_op = _events(runner, {ProfilerActivity.CPU, ProfilerActivity.CUDA}, op_by_op)
    launches: list[Launch] = read_launches(by_op, mode.ops)
    place()
    again()
    place()
    kernels = read_kernels(_events(runner, {ProfilerActivity.CUDA}, again))
    span_us = max(k.start_us + k.duration_us for k in kernels) - kernels[0].start_us
    place()
    return {
        "rows": num_rows, "bucket": num_rows, "drafts": num - 1,
        "context_tokens": context * num_rows, "wall_us": round(span_us / REPEATS, 1),
        "found": (kernels, launches),
    }  # fmt: skip


def _events(
    runner: Runner, activities: set[ProfilerActivity], work: Callable[[], None]
) -> list[dict[str, Any]]:
    """The trace's events of `work`."""
    runner.platform.synchronize()
    with profile(activities=activities) as recorded:
        work()
        runner.platform.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        recorded.export_chrome_trace(str(path))
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events: list[dict[str, Any]] = json.load(file)["traceEvents"]
            return events
