"""Warns once if steps take much longer than at warm-up, with possible causes."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from nanovllm.schedule.pace import DecodePace
from nanovllm.schedule.plan import StepPlan

logger = logging.getLogger(__name__)

EVERY_STEPS = 16  # one step in this many is timed
NUM_TIMED = 16  # compared by their median: 256 steps
SLOW_RATIO = 10.0


class StepWatch:
    """Compares the times of some decode steps with those at warm-up, until it warns."""

    def __init__(self, pace: DecodePace) -> None:
        self._pace, self._is_done = pace, not pace.step_ms
        self._ratios: list[float] = []
        self._times_ms: list[float] = []

    def note(self, seconds: float, launched: StepPlan | None, collected: StepPlan) -> None:
        """Record the time to launch a step and to wait for a result. Only plain decode steps count:
        others do work that warm-up has not timed."""
        if self._is_done or launched is None or not (_is_plain(launched) and _is_plain(collected)):
            return
        expected_ms = self._pace.most_ms(len(launched.rows), sum(launched.seq_lens))
        self._times_ms.append(1e3 * seconds)
        self._ratios.append(1e3 * seconds / expected_ms)
        if len(self._ratios) < NUM_TIMED:
            return
        ratio, median_ms = statistics.median(self._ratios), statistics.median(self._times_ms)
        self._ratios, self._times_ms = [], []
        if ratio >= SLOW_RATIO:
            self._is_done = True
            logger.warning(
                "decode steps take %.0f times as long as at warm-up, %.1f ms (the median of %d). "
                "Perhaps %s", ratio, median_ms, NUM_TIMED, "; or ".join(_causes()),
            )  # fmt: skip


def _is_plain(plan: StepPlan) -> bool:
    has_proposals = len(plan.token_T) > 0
    return not plan.is_prefill and plan.sampling.is_plain and not has_proposals


def _causes() -> Sequence[str]:
    """Possible causes of slow steps, with the system's figures."""
    load = ""
    if hasattr(os, "getloadavg"):
        load = f" (the load average is {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)"
    swapped = _swapped_bytes()
    swap = f" ({swapped / 2**20:.0f} MiB of this one are)" if swapped is not None else ""
    return (
        f"other processes use the cores or the device{load}",
        f"pages of processes are swapped out{swap}",
        "heat or a limit of power lowers the clock",
    )


def _swapped_bytes() -> int | None:
    """The bytes of this process that are swapped out; None if unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("VmSwap:")]
    return 1024 * int(found[0][1]) if found else None
