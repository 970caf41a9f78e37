"""A silent rank hangs unless it computes or reads pages of files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nanovllm.parallel.rank_handle import SILENT_SECONDS, RankProcess

Work = Callable[[int], tuple[float, int]]  # seconds of processor and major faults, by the tick


@pytest.mark.parametrize(
    ("work", "hangs"),
    [
        (lambda tick: (3.0, 7), True),
        (lambda tick: (3.0 + 0.002 * tick, 7), True),  # threads that look for Python's lock
        (lambda tick: (3.0 + 0.5 * tick, 7), False),
        (lambda tick: (3.0, 7 + tick), False),
    ],
    ids=["stopped", "waiting", "computing", "reading"],
)
def test_a_silent_rank_hangs_unless_it_computes_or_reads(work: Work, hangs: bool) -> None:
    rank: Any = object.__new__(RankProcess)
    rank._silent_seconds, rank._cpu_seconds, rank._num_faults = 0.0, 3.0, 7
    rank.is_connected = True
    ticks = iter(range(1000))
    rank._work_done = lambda: work(next(ticks))
    found = [rank.is_hung(0.5) for _ in range(int(2 * SILENT_SECONDS) + 4)]
    assert found[-1] == hangs
