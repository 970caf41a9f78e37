"""A silent rank hangs unless it computes or reads pages of files."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count

import pytest

from nanovllm.parallel.rank_handle import SILENT_SECONDS, SILENT_SECONDS_AT_START, RankProcess

Work = Callable[[int], tuple[float, int]]  # seconds of processor and major faults, by the tick


def silent_rank(work: Work, monkeypatch: pytest.MonkeyPatch) -> RankProcess:
    rank = object.__new__(RankProcess)
    rank._silent_seconds, rank._cpu_seconds, rank._num_faults = 0.0, 3.0, 7
    rank.is_connected = False
    ticks = count()
    monkeypatch.setattr(rank, "_work_done", lambda: work(next(ticks)))
    return rank


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
def test_a_silent_rank_hangs_unless_it_computes_or_reads(
    work: Work, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = silent_rank(work, monkeypatch)
    rank.note_connected()
    found = [rank.is_hung(0.5) for _ in range(int(2 * SILENT_SECONDS) + 4)]
    assert found[-1] == hangs


def test_a_rank_that_starts_slowly_does_not_hang_once_it_has_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first heartbeat comes a second later."""
    rank = silent_rank(lambda tick: (3.0, 7), monkeypatch)
    assert not any(rank.is_hung(0.5) for _ in range(int(2 * SILENT_SECONDS_AT_START) - 1))
    rank.note_connected()
    num_ticks = int(2 * SILENT_SECONDS)
    assert not any(rank.is_hung(0.5) for _ in range(num_ticks - 1)) and rank.is_hung(0.5)


def test_heartbeats_of_a_rank_that_waits_are_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = silent_rank(lambda tick: (3.0, 7), monkeypatch)
    rank.note_connected()
    rank.beats, beats = os.pipe()
    os.set_blocking(rank.beats, False)
    for _ in range(100):
        os.write(beats, b".")
        rank.note_beats()
        assert not rank.is_hung(SILENT_SECONDS - 0.5)
    rank.note_beats()
    assert rank.is_hung(SILENT_SECONDS)
    os.close(beats)
    os.close(rank.beats)
