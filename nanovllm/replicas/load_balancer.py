"""Chooses a replica for each request: one with the prompt's beginning in its cache, or an idle one.

Load and costs are tokens: those of a prompt and of the longest answer to it. Clients in several
processes share what they know, in memory where each writes to places of its own, or writes a single
number. A reader may see an older one, which costs a worse choice and no more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

# A replica is much busier than the idlest one if its load exceeds so many times that one's load,
# and so many times the new request. The second keeps a short queue beside an idle replica.
MUCH_BUSIER, FEW_REQUESTS = 2, 4
NUM_SLOTS = 1 << 18  # for the digests of a replica's blocks
NUMBER_BYTES = 8
_STAMPS = 1 << 32


def num_bytes(num_clients: int) -> int:
    """The bytes of memory that the clients of one replica share."""
    return NUMBER_BYTES * (2 * num_clients + NUM_SLOTS)


class Place:
    """The load of a replica, and the prompt blocks that it has probably cached.

    `capacity` is the number of its cache blocks. The blocks of the prompts that were sent there
    last are taken for cached. A block's digest chooses its slot, which has 32 bits of it and a
    stamp: how many new blocks were sent before. Another block may take the slot over.
    """

    def __init__(
        self,
        capacity: int,
        memory: memoryview | None = None,
        *,
        client: int = 0,
        num_clients: int = 1,
    ) -> None:
        """memory: zeros at first, `num_bytes` of them; None for a client alone."""
        numbers = (memory or memoryview(bytearray(num_bytes(num_clients)))).cast("Q")
        self._loads, self._counts = numbers[:num_clients], numbers[num_clients : 2 * num_clients]
        self._slots = numbers[2 * num_clients :]
        self._capacity, self._client = capacity, client
        self._first_stamp = 0

    @property
    def load(self) -> int:
        return sum(self._loads)

    def num_cached(self, digests: Sequence[bytes]) -> int:
        """The length of the chain's longest beginning that is cached, in blocks."""
        count = sum(self._counts)
        for num, digest in enumerate(digests):
            if not self._is_cached(digest, count):
                return num
        return len(digests)

    def add(self, digests: Sequence[bytes], cost: int) -> None:
        self._loads[self._client] += cost
        count = sum(self._counts)
        for digest in reversed(digests):  # the end of a chain is dropped first
            if not self._is_cached(digest, count):
                self._counts[self._client] += 1
                count += 1
            slot, tag = _slot_and_tag(digest)
            self._slots[slot] = tag * _STAMPS + count % _STAMPS

    def release(self, cost: int) -> None:
        """Subtract the cost of a request that has ended."""
        self._loads[self._client] -= cost

    def forget(self) -> None:
        """Take no block for cached."""
        self._first_stamp = sum(self._counts)

    def _is_cached(self, digest: bytes, count: int) -> bool:
        slot, tag = _slot_and_tag(digest)
        found_tag, stamp = divmod(self._slots[slot], _STAMPS)
        age = (count - stamp) % _STAMPS
        return found_tag == tag and age < min(self._capacity, count - self._first_stamp)


def _slot_and_tag(digest: bytes) -> tuple[int, int]:
    """The place of a digest, and a number above 0 for it."""
    number = int.from_bytes(digest[:8], "little")
    return number % NUM_SLOTS, (number // NUM_SLOTS) % _STAMPS or 1


def choose(
    places: Sequence[Place], among: Collection[int], digests: Sequence[bytes], cost: int
) -> int:
    """The number of the place, among some, for a request with these prompt blocks.

    It is the one with the longest cached beginning, and the idlest of several such, unless it is
    much busier than the idlest of all.
    """
    loads = {index: places[index].load for index in among}
    limit = MUCH_BUSIER * min(loads.values()) + FEW_REQUESTS * cost
    usable = [index for index, load in loads.items() if load <= limit]
    return min(usable, key=lambda index: (-places[index].num_cached(digests), loads[index], index))
