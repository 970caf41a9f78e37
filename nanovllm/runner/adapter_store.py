"""The adapters of one rank: their numbers in host memory, and in slots on the device."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.models.lora.adapter_file import AdapterFile, Buffer
from nanovllm.models.lora.host_adapter import HostAdapter, layout
from nanovllm.models.lora.slots import matrices, targets
from nanovllm.models.model import Model, Params
from nanovllm.models.shards import Shard
from nanovllm.platforms.base import Platform
from nanovllm.schedule.plan import RowSettings

MAX_RESERVED_BYTES = 2 << 30


class AdapterStore:
    """Reads adapters to host memory in a thread, and copies them to slots of the layers.

    Host memory is pinned, for one adapter more than there are slots, up to MAX_RESERVED_BYTES. All
    of it is reserved at the start: steps that run meanwhile would wait for the device's driver.
    Further adapters are in other memory, from which a copy takes longer.

    A copy is a launch like that of a step: steps before it read what was in the slot, steps after
    it the adapter. Programs and captured steps have the addresses of the slots, and stay.
    """

    def __init__(self, model: Model, params: Params, platform: Platform, shard: Shard) -> None:
        self._model, self._platform, self._shard = model, platform, shard
        self._files: dict[int, AdapterFile] = {}
        self._host: dict[int, Future[HostAdapter]] = {}
        self._pinned: set[int] = set()  # adapters
        self._num_reserved = 0
        self._number_of_row: dict[int, int] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._targets = [] if model.lora is None else list(targets(model))
        self._layers = params.layers
        slots = [one for target in self._targets for one in matrices(params, target)]
        if model.lora is not None:
            _stay_alone(self._reader)
            self._reserve(layout(model, self._targets, shard.size)[1], model.lora.num + 1)
        # of each slot, in the order of `HostAdapter.places`
        self._slots: list[list[Tensor]] = [
            [one.select(0, slot) for one in slots]
            for slot in range(0 if model.lora is None else model.lora.num)
        ]

    def _reserve(self, sizes: list[int], num: int) -> None:
        """Let the allocator of host memory have pinned blocks for so many adapters."""
        self._num_reserved = min(num, max(1, MAX_RESERVED_BYTES // sum(sizes)))
        buffers = [self._platform.host_buffer(size) for size in sizes * self._num_reserved]
        buffers.clear()

    def note(self, settings: Iterable[RowSettings]) -> None:
        """Remember the slots of new rows of the state."""
        self._number_of_row.update((one.row, one.adapter) for one in settings)

    def has_any(self, rows: Iterable[int]) -> bool:
        """Whether one of these rows of the state has an adapter."""
        return any(map(self._number_of_row.get, rows))

    def check(self, adapter_id: int, folder: Path) -> bytes:
        """Check an adapter's files, without its numbers; returns their digest. Raises AdapterError,
        a ValueError."""
        biases = {
            i: getattr(self._layers[one.layer_idx], one.bias_field).float().cpu()
            for i, one in enumerate(self._targets)
            if one.bias is not None
        }
        file = self._files[adapter_id] = AdapterFile(self._model, folder, self._targets, biases)
        return file.digest

    def digest(self, adapter_id: int) -> bytes:
        """The digest of a checked adapter's files."""
        return self._files[adapter_id].digest

    def read(self, adapter_id: int) -> None:
        """Begin to read the numbers of a checked adapter."""
        read = self._files[adapter_id].read
        buffer: Buffer = pageable
        if len(self._pinned) < self._num_reserved:
            self._pinned.add(adapter_id)
            buffer = self._platform.host_buffer
        self._host[adapter_id] = self._reader.submit(read, self._shard, buffer)

    def is_read(self, adapter_id: int) -> bool:
        """Whether the numbers are in host memory. Raises AdapterError if they cannot be read."""
        found = self._host[adapter_id]
        return found.done() and bool(found.result())

    def wait(self, seconds: float) -> bool:
        """Wait up to so long until an adapter that is being read is in host memory. False if none
        is being read."""
        pending = [found for found in self._host.values() if not found.done()]
        futures.wait(pending, seconds, futures.FIRST_COMPLETED)
        return bool(pending)

    def drop(self, adapter_id: int) -> None:
        """Forget an adapter, and free its host memory. Slots keep what they have."""
        self._files.pop(adapter_id, None)
        self._pinned.discard(adapter_id)
        found = self._host.pop(adapter_id, None)
        if found is not None:
            found.cancel()

    def load(self, adapter_id: int, number: int) -> None:
        """Copy an adapter to the slot `number`, from 1 on; waits until it is read, but not for the
        device."""
        host = self._host[adapter_id].result()
        blocks = [one.to(self._platform.device, non_blocking=True) for one in host.blocks]
        torch._foreach_copy_(self._slots[number - 1], host.matrices(blocks))

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._files.clear()
        self._host.clear()
        self._slots.clear()
        self._layers = ()


def pageable(num_bytes: int) -> Tensor:
    """Bytes on the host that are not pinned."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def _stay_alone(reader: ThreadPoolExecutor) -> None:
    """Let torch's ops of the reader's thread run in that thread alone.

    An adapter has hundreds of small matrices. For each op on one, OpenMP would start as many
    threads as there are cores, which then spin for a while on the cores that steps need.
    """

    def use_one_thread() -> None:
        torch.get_num_threads()  # the first call in a thread takes torch's number
        torch.set_num_threads(1)  # of the calling thread, and of threads that begin later

    num_threads = torch.get_num_threads()
    reader.submit(use_one_thread).result()
    torch.set_num_threads(num_threads)
