"""Which adapter each slot of the device holds."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.schedule.plan import AdapterLoad


@dataclass
class _Slot:
    adapter_id: int = 0  # 0: empty
    num_users: int = 0  # running requests
    last_used: int = 0


class AdapterSlots:
    """A slot keeps its adapter until another one needs it. The one that no running request uses,
    and that was unused for longest, is replaced first.

    `loads` are the copies to the device that the next step must begin with.
    """

    def __init__(self, num_slots: int) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._clock = 0
        self.loads: list[AdapterLoad] = []

    def has_room(self, adapter_id: int) -> bool:
        """Whether `take` would succeed."""
        return self._find(adapter_id) is not None

    def take(self, adapter_id: int) -> int:
        """The number of the slot, from 1 on, that a request uses until `release`."""
        found = self._find(adapter_id)
        assert found is not None
        slot = self._slots[found]
        if slot.adapter_id != adapter_id:
            self.loads = [load for load in self.loads if load.number != found + 1]
            self.loads.append(AdapterLoad(adapter_id, found + 1))
            slot.adapter_id = adapter_id
        slot.num_users += 1
        self._touch(slot)
        return found + 1

    def release(self, number: int) -> None:
        """A request with the slot `number` has ended, or waits again. 0: it has no adapter."""
        if number:
            slot = self._slots[number - 1]
            slot.num_users -= 1
            self._touch(slot)

    def forget(self, adapter_id: int) -> None:
        """Empty the slot of an adapter that no running request uses."""
        self.loads = [load for load in self.loads if load.adapter_id != adapter_id]
        for slot in self._slots:
            if slot.adapter_id == adapter_id:
                assert not slot.num_users
                slot.adapter_id = 0

    def reset(self) -> None:
        """Empty all slots, after a step that may not have run."""
        self._slots = [_Slot() for _ in self._slots]
        self.loads = []

    def take_loads(self) -> list[AdapterLoad]:
        loads, self.loads = self.loads, []
        return loads

    @property
    def loaded(self) -> set[int]:
        """The ids of the adapters in slots."""
        return {slot.adapter_id for slot in self._slots} - {0}

    def _find(self, adapter_id: int) -> int | None:
        """The index of an adapter's slot, or of the one that it would get."""
        free = []
        for index, slot in enumerate(self._slots):
            if slot.adapter_id == adapter_id:
                return index
            if not slot.num_users:
                free.append((slot.adapter_id != 0, slot.last_used, index))
        return min(free)[2] if free else None

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.last_used = self._clock
