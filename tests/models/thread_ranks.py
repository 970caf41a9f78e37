"""Ranks as threads of one process: what their collectives compute, without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from nanovllm.kernels import collectives

Result = TypeVar("Result")
SECONDS = 60.0


class Meeting:
    """All ranks bring a value and get those of all, in the order of ranks."""

    def __init__(self, size: int) -> None:
        self.size, self._values = size, [None] * size
        self._barrier = threading.Barrier(size, timeout=SECONDS)

    def exchange(self, rank: int, value: object) -> list[object]:
        self._values[rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def abort(self) -> None:
        self._barrier.abort()


@dataclass(frozen=True)
class ThreadGroup:
    """A `Communicator`."""

    meeting: Meeting
    rank: int

    @property
    def name(self) -> str:
        return ""

    @property
    def peers(self) -> None:
        return None

    @property
    def size(self) -> int:
        return self.meeting.size

    def all_reduce(self, x: Tensor) -> None:
        x.copy_(torch.stack(self.meeting.exchange(self.rank, x.clone())).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, x))

    def min_int(self, value: int) -> int:
        return min(self.meeting.exchange(self.rank, value))


def on_ranks(size: int, work: Callable[[ThreadGroup], Result]) -> list[Result]:
    """What `work` returns on each of `size` ranks."""
    meeting = Meeting(size)

    def run(rank: int) -> Result:
        group = ThreadGroup(meeting, rank)
        try:
            with collectives.using(group):
                return work(group)
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
