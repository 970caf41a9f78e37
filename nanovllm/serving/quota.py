"""The limit on waiting answers that all clients of one engine share."""

from __future__ import annotations

import mmap
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm.serving.interface import QueueFull

Counts = mmap.mmap  # the number of unfinished answers of each client
MAX_QUEUED = 4096  # the default of `Client`
_NUMBER = struct.Struct("<q")


class Quota:
    """Unfinished answers of all clients: each counts its own in a place of shared memory.

    Only the client writes to its place, so no lock is needed. Two clients that look at the same
    moment can go over the limit by what they add.
    """

    def __init__(self, index: int, memory: Counts, limit: int) -> None:
        """index: of this client. limit: the most answers of all clients."""
        self._index, self._memory, self.limit = index, memory, limit
        self._num_own = 0

    @property
    def num_all(self) -> int:
        return sum(number for (number,) in _NUMBER.iter_unpack(self._memory[:]))

    def take(self, num: int) -> None:
        """Count new answers. Raises QueueFull."""
        used = self.num_all
        if used + num > self.limit:
            raise QueueFull(
                f"{used} answers are unfinished and {num} are asked for: at most {self.limit} may "
                "run and wait"
            )
        self._set(self._num_own + num)

    def give_back(self, num: int) -> None:
        self._set(self._num_own - num)

    def _set(self, number: int) -> None:
        self._num_own = number
        _NUMBER.pack_into(self._memory, self._index * _NUMBER.size, number)


def checked_limit(max_queued: int) -> int:
    """Returns the limit. Raises ValueError if it is invalid."""
    if type(max_queued) is not int or max_queued < 0:
        raise ValueError(f"max_queued is {max_queued!r}: it must be a whole number, at least 0")
    return max_queued


def own_counts() -> Counts:
    """The memory of an engine's only client."""
    return mmap.mmap(-1, _NUMBER.size)


@contextmanager
def new_file(num_clients: int) -> Iterator[int]:
    """The descriptor of such memory, for processes that are started within. It has no name."""
    with tempfile.TemporaryFile() as file:
        file.truncate(num_clients * _NUMBER.size)
        yield file.fileno()


def inherited_counts(descriptor: int) -> Counts:
    """The memory in a file that this process has inherited."""
    return mmap.mmap(descriptor, 0)


def num_clients_of(counts: Counts) -> int:
    return len(counts) // _NUMBER.size
