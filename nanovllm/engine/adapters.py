"""The adapters of one engine in host memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanovllm.checks import InvalidValue, WorkFailed
from nanovllm.lora_request import FIELD, LoRARequest, checked
from nanovllm.runner.runner import Runner
from nanovllm.schedule.adapter_slots import AdapterSlots


@dataclass
class Adapter:
    """A known adapter. Its files have been checked, and a thread has perhaps begun to read them.

    digest: of its files. Equal tokens have other keys and values with others. is_read: `is_ready`
        has found it whole in host memory.
    """

    request: LoRARequest
    digest: bytes
    is_in_memory: bool = False
    is_read: bool = False


class Adapters:
    """Adapters by their numbers, the one that was used last at the end.

    At most `max_in_memory` are in host memory. The one that no unfinished request uses, and that
    was unused for longest, makes room for another; it is read again when a request names it.
    """

    def __init__(
        self,
        runner: Runner,
        slots: AdapterSlots | None,
        max_in_memory: int,
        in_use: weakref.WeakMethod[Callable[[], set[int]]],
    ) -> None:
        """`in_use` gives the numbers of the adapters that unfinished requests use, without keeping
        the engine that has both."""
        self._runner, self._slots, self._in_use_of = runner, slots, in_use
        self._max_in_memory = max_in_memory
        self._known: dict[int, Adapter] = {}

    @property
    def requests(self) -> list[LoRARequest]:
        """The adapters that are known."""
        return [one.request for one in self._known.values()]

    @property
    def _in_use(self) -> set[int]:
        asks = self._in_use_of()
        return set() if asks is None else asks()

    @property
    def _awaited(self) -> set[int]:
        """The adapters that unfinished requests use, and that are not in host memory."""
        return {one for one in self._in_use & self._known.keys() if not self.has_place(one)}

    def find(self, asked: LoRARequest | None) -> Adapter | None:
        """The adapter of a request; None for none. A new one's files are checked.

        Raises ValueError if adapters are not enabled, if the files are damaged, not supported or do
        not fit the model, and for the number of another adapter.
        """
        asked = checked(asked, is_enabled=self._slots is not None)
        if asked is None:
            return None
        found = self._known.pop(asked.lora_int_id, None)
        if found is not None and found.request != asked:
            self._known[asked.lora_int_id] = found
            raise InvalidValue(
                FIELD,
                f"lora_int_id {asked.lora_int_id} is that of {found.request.lora_name!r} from "
                f"{found.request.path}, not of {asked.lora_name!r} from {asked.path}",
            )
        if found is None:
            try:
                digest = self._runner.check_adapter(asked.lora_int_id, Path(asked.path))
            except ValueError as error:
                raise InvalidValue(FIELD, f"adapter {asked.lora_name!r}: {error}") from error
            found = Adapter(asked, digest)
        self._known[asked.lora_int_id] = found
        return found

    def wait(self, seconds: float) -> bool:
        """Wait up to so long until an adapter that is being read is in host memory. False if none
        is being read."""
        return self._runner.wait_for_adapters(seconds)

    def has_place(self, adapter_id: int) -> bool:
        """Whether an adapter is in host memory or being read. It stays there while an unfinished
        request has it."""
        return adapter_id in self._known and self._known[adapter_id].is_in_memory

    def begin(self, adapter_id: int) -> bool:
        """Begin to read an adapter before there is a request with it. It takes no room for which
        unfinished requests of other adapters wait. Whether it has been read: else the request has
        to wait for `is_ready`, which also raises what has failed."""
        if not self.has_place(adapter_id) and self._awaited - {adapter_id}:
            return False
        return self._begin_reading(adapter_id) and self._known[adapter_id].is_read

    def is_ready(self, adapter_id: int) -> bool:
        """Whether an adapter is in host memory; begins to read it as soon as there is room.

        Raises ValueError if it cannot be read, whatever the cause, and forgets it.
        """
        if adapter_id not in self._known:
            raise InvalidValue(FIELD, f"adapter {adapter_id} could not be read")
        adapter = self._known[adapter_id]
        if not self._begin_reading(adapter_id):
            return False
        try:
            adapter.is_read = self._runner.adapter_is_read(adapter_id)
            return adapter.is_read
        except ValueError as error:
            self._drop(adapter_id)
            words = f"adapter {adapter.request.lora_name!r}: {error}"
            raise InvalidValue(FIELD, words) from error
        except Exception as error:  # such as too little memory; it would come back in each step
            self._drop(adapter_id)
            words = f"reading adapter {adapter.request.lora_name!r}"
            raise WorkFailed.of(words, error) from error

    def remove(self, adapter_id: int) -> bool:
        """Drop an adapter; False if it is not known. Raises ValueError while requests use it."""
        if adapter_id not in self._known:
            return False
        if adapter_id in self._in_use:
            name = self._known[adapter_id].request.lora_name
            raise InvalidValue(FIELD, f"adapter {name!r} is in use: unfinished requests have it")
        self._drop(adapter_id)
        return True

    def _begin_reading(self, adapter_id: int) -> bool:
        """Begin to read an adapter if that has not begun; False if there is no room for it."""
        adapter = self._known[adapter_id]
        if not adapter.is_in_memory:
            if not self._make_room(adapter_id):
                return False
            self._runner.read_adapter(adapter_id)
            adapter.is_in_memory = True
        return True

    def _make_room(self, adapter_id: int) -> bool:
        """Drop adapters until there is host memory for another; False if all are in use."""
        in_use = self._in_use
        in_memory = [one for one, adapter in self._known.items() if adapter.is_in_memory]
        unused = [one for one in in_memory if one not in in_use]
        while len(in_memory) >= self._max_in_memory and unused:
            self._drop(unused.pop(0))
            in_memory.pop()
        return len(in_memory) < self._max_in_memory

    def _drop(self, adapter_id: int) -> None:
        assert self._slots is not None
        del self._known[adapter_id]
        self._slots.forget(adapter_id)
        self._runner.drop_adapter(adapter_id)
