"""The memory budget for decoding, over all threads and processes of a `Preparer`."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from nanovllm.confined import LOOK_S

# Decoders need as much beside the encoded file: coefficients of progressive JPEGs, reference frames
# of videos, copies without transparency.
BYTES_PER_PIXEL = 24
WORKER_BYTES = 48 << 20  # 2 megapixels


class Memory:
    """Each of `num_workers` has a reserved part for ordinary files, at most half of `max_bytes` in
    all. Larger files share the rest, first come, first served. A file larger than the rest runs
    when no other one uses it.
    """

    def __init__(self, max_bytes: int, num_workers: int) -> None:
        self.worker_bytes = min(WORKER_BYTES, max_bytes // (2 * num_workers))
        self._shared_bytes = max_bytes - num_workers * self.worker_bytes
        self.num_shared = 0  # bytes in use
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextlib.contextmanager
    def part(self, check: Callable[[], None]) -> Iterator[Reservation]:
        """The memory of one worker's file. `check` raises if the work is cancelled."""
        part = Reservation(self, check)
        try:
            yield part
        finally:
            part.give_back()

    def take(self, num_bytes: int, check: Callable[[], None]) -> None:
        """Waits for shared bytes."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or not self._fits(num_bytes):
                    self._changed.wait(LOOK_S)
                    check()
                self.num_shared += num_bytes
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self.num_shared -= num_bytes
            self._changed.notify_all()

    def _fits(self, num_bytes: int) -> bool:
        return not self.num_shared or self.num_shared + num_bytes <= self._shared_bytes


class Reservation:
    """The memory of one file: the worker's reserved bytes, or more after `grow`."""

    def __init__(self, memory: Memory, check: Callable[[], None]) -> None:
        self.num_bytes, self.check = memory.worker_bytes, check
        self._memory, self._num_shared = memory, 0

    def grow(self, num_bytes: int) -> None:
        """Waits until the file may take this many bytes. It must not hold shared bytes meanwhile:
        two files that wait for each other would deadlock."""
        if num_bytes <= self.num_bytes:
            return
        self.give_back()
        self._memory.take(num_bytes, self.check)
        self.num_bytes = self._num_shared = num_bytes

    def give_back(self) -> None:
        self._memory.give_back(self._num_shared)
        self.num_bytes, self._num_shared = self._memory.worker_bytes, 0
