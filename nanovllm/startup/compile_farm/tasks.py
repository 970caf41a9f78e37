"""The tasks of workers and their order. Does not import torch."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Bucket = tuple[str, int]  # ("prefill", tokens) or ("decode", rows)


@dataclass(frozen=True)
class BuildOutcome:
    """One bucket's numbers of programs compiled, programs found and kernels compiled; seconds."""

    bucket: Bucket
    programs: int
    found: int
    kernels: int
    seconds: float


@dataclass(order=True)
class Task:
    """ "run" or "dry_run" a bucket, or "compile" a kernel. The smallest `rank` is done first."""

    rank: tuple[int, int]
    verb: str = field(compare=False)
    what: Any = field(compare=False)

    @property
    def is_kernel(self) -> bool:
        """True for tasks that never create tasks."""
        return self.verb == "compile"

    def __str__(self) -> str:
        return f"{self.verb} {self.what if self.is_kernel else ' '.join(map(str, self.what))}"


class TaskQueue:
    """Tasks by rank, for several threads; ends once no task is left and none can be added."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._waiting = sorted(tasks)
        self._num_open = len([task for task in tasks if not task.is_kernel])  # unfinished buckets
        self._changed = threading.Condition()

    def take(self) -> Task | None:
        """The next task, after which `done` must be called; None at the end of the queue.

        Waits while the queue is empty and a bucket that is being built may add kernels.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._num_open)
            return heapq.heappop(self._waiting) if self._waiting else None

    def done(self, task: Task, *kernels: Task) -> None:
        """Record the end of a task, with or without success, and add `kernels`."""
        with self._changed:
            for kernel in kernels:
                heapq.heappush(self._waiting, kernel)
            self._num_open -= not task.is_kernel
            self._changed.notify_all()
