"""The limit on waiting answers, shared by all clients of an engine, and its memory."""

from __future__ import annotations

import mmap
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nanovllm.replicas import load_balancer
from nanovllm.replicas.load_balancer import Place
from nanovllm.serving.async_engine import QueueFull

# Layout: the number of clients, each client's number of unfinished answers and, with several
# engines, each engine's load and cache as clients track them.
Counts = mmap.mmap
MAX_QUEUED = 4096  # the default of `Client`
_NUMBER = struct.Struct("<q")


class Admission:
    """Unfinished answers of all clients; each client counts its own in shared memory.

    Each client writes only its own counter, so no lock is needed. Clients that check at the same
    moment can exceed the limit by what they add.
    """

    def __init__(self, index: int, memory: Counts, limit: int) -> None:
        """index: of this client. limit: the maximum number of answers of all clients."""
        self.limit, self._num_own = limit, 0
        places = slice(_NUMBER.size, _NUMBER.size + num_clients_of(memory) * _NUMBER.size)
        self._places, self._offset = memoryview(memory)[places], index * _NUMBER.size

    @property
    def num_all(self) -> int:
        return sum(number for (number,) in _NUMBER.iter_unpack(self._places))

    def take(self, num: int) -> None:
        """Count new answers. Raises QueueFull."""
        used = self.num_all
        if used + num > self.limit:
            raise QueueFull(
                f"{used} answers are unfinished and {num} are requested: at most {self.limit} may "
                "run and wait"
            )
        self._set(self._num_own + num)

    def give_back(self, num: int) -> None:
        self._set(self._num_own - num)

    def _set(self, number: int) -> None:
        self._num_own = number
        _NUMBER.pack_into(self._places, self._offset, number)


def checked_limit(max_queued: int) -> int:
    """The limit. Raises ValueError if it is invalid."""
    if type(max_queued) is not int or max_queued < 0:
        raise ValueError(f"max_queued is {max_queued!r}: it must be a whole number, at least 0")
    return max_queued


def own_counts(num_engines: int = 1) -> Counts:
    """The memory for a single client of this many engines."""
    return _begun(mmap.mmap(-1, _num_bytes(1, num_engines)), 1)


@contextmanager
def new_file(num_clients: int, num_engines: int = 1) -> Iterator[int]:
    """A file descriptor of such memory, for child processes to inherit. The file has no name."""
    with tempfile.TemporaryFile() as file:
        file.truncate(_num_bytes(num_clients, num_engines))
        _begun(inherited_counts(file.fileno()), num_clients)
        yield file.fileno()


def inherited_counts(descriptor: int) -> Counts:
    """The memory in an inherited file."""
    return mmap.mmap(descriptor, 0)


def num_clients_of(counts: Counts) -> int:
    return int(_NUMBER.unpack_from(counts)[0])


def places(counts: Counts, index: int, capacities: Sequence[int]) -> list[Place]:
    """The client's view of engines with these numbers of cache blocks."""
    num_clients = num_clients_of(counts)
    size, start = load_balancer.num_bytes(num_clients), _num_bytes(num_clients, 1)
    views = (memoryview(counts)[start + size * i :][:size] for i in range(len(capacities)))
    return [
        Place(capacity, view, client=index, num_clients=num_clients)
        for capacity, view in zip(capacities, views)
    ]


def _num_bytes(num_clients: int, num_engines: int) -> int:
    shared = load_balancer.num_bytes(num_clients) * num_engines if num_engines > 1 else 0
    return _NUMBER.size + num_clients * _NUMBER.size + shared


def _begun(counts: Counts, num_clients: int) -> Counts:
    _NUMBER.pack_into(counts, 0, num_clients)
    return counts
