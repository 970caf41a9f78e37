"""Chooses a replica for each request: one that has the prompt's prefix cached, or an idle one.

Load and cost are in tokens: the prompt plus the longest possible answer. Clients in several
processes share their view through memory. Each writes only its own counters, or single numbers; a
reader may get a stale one, which only makes its choice worse.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

# A replica is much busier than the idlest one if its load exceeds this multiple of that load plus
# this multiple of the new request. The second term tolerates a short queue beside an idle replica.
MUCH_BUSIER, FEW_REQUESTS = 2, 4
NUM_SLOTS = 1 << 18  # for the digests of a replica's blocks
NUMBER_BYTES = 8
_STAMPS = 1 << 32


def num_bytes(num_clients: int) -> int:
    """The size of the memory that the clients of one replica share."""
    return NUMBER_BYTES * (2 * num_clients + NUM_SLOTS)


class Place:
    """The load of a replica, and the prompt blocks that it has probably cached.

    `capacity` is its number of KV cache blocks. The most recently sent prompt blocks are assumed to
    be cached. A block's digest selects a slot, which stores 32 bits of the digest and a stamp: the
    number of new blocks sent before. Another block may overwrite the slot.
    """

    def __init__(
        self,
        capacity: int,
        memory: memoryview | None = None,
        *,
        client: int = 0,
        num_clients: int = 1,
    ) -> None:
        """memory: `num_bytes` bytes, initially zero; None for a single client."""
        numbers = (memory or memoryview(bytearray(num_bytes(num_clients)))).cast("Q")
        self._loads, self._counts = numbers[:num_clients], numbers[num_clients : 2 * num_clients]
        self._slots = numbers[2 * num_clients :]
        self._capacity, self._client = capacity, client
        self._first_stamp = 0

    @property
    def load(self) -> int:
        return sum(self._loads)

    def num_cached(self, digests: Sequence[bytes]) -> int:
        """The number of leading blocks that are cached."""
        count = sum(self._counts)
        for num, digest in enumerate(digests):
            if not self._is_cached(digest, count):
                return num
        return len(digests)

    def add(self, digests: Sequence[bytes], cost: int) -> None:
        self._loads[self._client] += cost
        count = sum(self._counts)
        for digest in reversed(digests):  # blocks at the end are evicted first
            if not self._is_cached(digest, count):
                self._counts[self._client] += 1
                count += 1
            slot, tag = _slot_and_tag(digest)
            self._slots[slot] = tag * _STAMPS + count % _STAMPS

    def release(self, cost: int) -> None:
        """Subtract the cost of a finished request."""
        self._loads[self._client] -= cost

    def forget(self) -> None:
        """Assume that no block is cached."""
        self._first_stamp = sum(self._counts)

    def _is_cached(self, digest: bytes, count: int) -> bool:
        slot, tag = _slot_and_tag(digest)
        found_tag, stamp = divmod(self._slots[slot], _STAMPS)
        age = (count - stamp) % _STAMPS
        return found_tag == tag and age < min(self._capacity, count - self._first_stamp)


def _slot_and_tag(digest: bytes) -> tuple[int, int]:
    """The slot of a digest, and its tag, which is above 0."""
    number = int.from_bytes(digest[:8], "little")
    return number % NUM_SLOTS, (number // NUM_SLOTS) % _STAMPS or 1


def choose(
    places: Sequence[Place], among: Collection[int], digests: Sequence[bytes], cost: int
) -> int:
    """The index of the place for a request with these prompt blocks.

    The one with the longest cached prefix, the idlest if there are several, unless it is much
    busier than the idlest of all.
    """
    loads = {index: places[index].load for index in among}
    limit = MUCH_BUSIER * min(loads.values()) + FEW_REQUESTS * cost
    usable = [index for index, load in loads.items() if load <= limit]
    return min(usable, key=lambda index: (-places[index].num_cached(digests), loads[index], index))
