"""Chooses a replica for each request: one with the prompt's beginning in its cache, or an idle one.

Load and costs are tokens: those of a prompt and of the longest answer to it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

# A replica is much busier than the idlest one if its load exceeds so many times that one's load,
# and so many times the new request. The second keeps a short queue beside an idle replica.
MUCH_BUSIER, FEW_REQUESTS = 2, 4


class Place:
    """The load of a replica, and the prompt blocks that it has probably cached.

    `capacity` is the number of its cache blocks. The blocks of the prompts that were sent there
    last are taken for cached.
    """

    def __init__(self, capacity: int) -> None:
        self.load = 0
        self._capacity = capacity
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def num_cached(self, digests: Sequence[bytes]) -> int:
        """The length of the chain's longest beginning that is cached, in blocks."""
        for num, digest in enumerate(digests):
            if digest not in self._digests:
                return num
        return len(digests)

    def add(self, digests: Sequence[bytes], cost: int) -> None:
        self.load += cost
        for digest in reversed(digests):  # the end of a chain is dropped first
            self._digests[digest] = None
            self._digests.move_to_end(digest)
        while len(self._digests) > self._capacity:
            self._digests.popitem(last=False)

    def forget(self) -> None:
        """Take no block for cached."""
        self._digests.clear()


def choose(
    places: Sequence[Place], among: Collection[int], digests: Sequence[bytes], cost: int
) -> int:
    """The number of the place, among some, for a request with these prompt blocks.

    It is the one with the longest cached beginning, and the idlest of several such, unless it is
    much busier than the idlest of all.
    """
    least = min(places[index].load for index in among)
    limit = MUCH_BUSIER * least + FEW_REQUESTS * cost
    usable = [index for index in among if places[index].load <= limit]
    return min(
        usable, key=lambda index: (-places[index].num_cached(digests), places[index].load, index)
    )
