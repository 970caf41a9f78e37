"""Which snapshots of rows' recurrent states there are, by the digests of their prefixes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class SnapshotPool:
    """Slots for snapshots; the one that is unused for longest is overwritten first.

    A snapshot is found from the next `commit` on: the step that makes it restores others before.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots: OrderedDict[bytes, int]
        self._free: list[int]
        self._made: dict[bytes, int]
        self._num_pins: dict[int, int]
        self.reset()

    def longest(self, digests: Sequence[bytes], num: int) -> int:
        """The longest prefix of up to `num` blocks of a chain that has a snapshot; 0 for none."""
        while num and digests[num - 1] not in self._slots:
            num -= 1
        return num

    def pin(self, digest: bytes) -> int:
        """The slot of a snapshot, which stays until `unpin`."""
        self._slots.move_to_end(digest)
        slot = self._slots[digest]
        self._num_pins[slot] = self._num_pins.get(slot, 0) + 1
        return slot

    def unpin(self, slot: int) -> None:
        """Take one pin away."""
        self._num_pins[slot] -= 1
        if not self._num_pins[slot]:
            del self._num_pins[slot]
            if slot not in self._slots.values():  # it was forgotten meanwhile
                self._free.append(slot)

    def take(self, digest: bytes) -> int | None:
        """A slot for a new snapshot; None if there is one already, or no slot is left."""
        if digest in self._slots or digest in self._made:
            return None
        if not self._free:
            unpinned = (one for one, slot in self._slots.items() if slot not in self._num_pins)
            oldest = next(unpinned, None)
            if oldest is None:
                return None
            self._free.append(self._slots.pop(oldest))
        self._made[digest] = self._free.pop()
        return self._made[digest]

    def commit(self) -> None:
        """The steps that were planned so far come before those that are planned from now on."""
        self._slots.update(self._made)
        self._made.clear()

    def evict(self, digests: Iterable[bytes] | None = None) -> None:
        """Let no request find the snapshots of these prefixes, or of any, any more."""
        self.commit()
        for digest in list(self._slots) if digests is None else digests:
            slot = self._slots.pop(digest, None)
            if slot is not None and slot not in self._num_pins:
                self._free.append(slot)

    def reset(self) -> None:
        """Free all slots. Owners must drop their pins."""
        self._slots, self._made, self._num_pins = OrderedDict(), {}, {}
        self._free = list(range(self.num_slots - 1, -1, -1))
