"""The base of CUDA and NPU platforms: copies through pinned memory, and torch's memory statistics.

torch_npu has the functions of `torch.cuda` under `torch.npu`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.platforms.base import HostCopy, MemoryBudget, Platform


class Accelerator(Platform):
    """runtime: torch.cuda or torch.npu."""

    runtime: Any

    def enter_thread(self) -> None:
        self.runtime.set_device(self.device)  # the current device is per thread

    def upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        # the pinned allocator keeps the buffer until the copy has run
        return torch.as_tensor(values, dtype=dtype).pin_memory().to(self.device, non_blocking=True)

    def write(self, target: Tensor, values: Any) -> None:
        if isinstance(values, np.ndarray) and values.dtype == np.uint8:
            host = torch.empty(values.shape, dtype=torch.uint8, pin_memory=True)
            host.numpy()[...] = values  # torch would divide the copy among threads, which then spin
        else:
            host = torch.as_tensor(values, dtype=target.dtype).pin_memory()
        target.copy_(host, non_blocking=True)

    def read_back(self, tensor: Tensor) -> HostCopy:
        return _PinnedCopy(tensor, self.runtime)

    def host_buffer(self, num_bytes: int) -> Tensor:
        return pinned_if_possible(num_bytes)

    def synchronize(self) -> None:
        # an engine that was not closed is deleted while Python exits, after torch_npu is torn down
        if not sys.is_finalizing():
            self.runtime.synchronize(self.device)

    def memory_budget(self, utilization: float) -> MemoryBudget:
        free_bytes, total_bytes = self.runtime.mem_get_info(self.device)
        stats = self.runtime.memory_stats(self.device)
        allocated_bytes = stats["allocated_bytes.all.current"]
        # memory that torch's allocator has reserved but not allocated counts as free
        unused_bytes = stats["reserved_bytes.all.current"] - allocated_bytes
        held_bytes = total_bytes - free_bytes - unused_bytes
        scratch_bytes = stats["allocated_bytes.all.peak"] - allocated_bytes
        return MemoryBudget(int(utilization * total_bytes) - held_bytes, scratch_bytes)

    def cache_limit_bytes(self) -> int:
        free_bytes, _ = self.runtime.mem_get_info(self.device)
        reserved_bytes = self.runtime.memory_reserved(self.device)
        return int(free_bytes + reserved_bytes - self.runtime.memory_allocated(self.device))

    def used_bytes(self) -> int:
        free_bytes, total_bytes = self.runtime.mem_get_info(self.device)
        return int(total_bytes - free_bytes)

    def reset_peak(self) -> None:
        self.runtime.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        return int(self.runtime.max_memory_allocated(self.device))

    def release(self) -> None:
        if not sys.is_finalizing():
            self.runtime.empty_cache()


def visible_devices(first: int, num_devices: int, visible: str | None) -> str:
    """The value of the driver's variable that shows a process `num_devices` devices.

    They are those from number `first` on among the devices in `visible`, our own value.
    """
    names = [str(i) for i in range(first + num_devices)] if visible is None else visible.split(",")
    return ",".join(name.strip() for name in names[first : first + num_devices])


def pinned_if_possible(num_bytes: int) -> Tensor:
    """Host memory, pinned if the system allows it: copies are then several times as fast."""
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(num_bytes, dtype=torch.uint8)


class _PinnedCopy:
    """A copy to pinned memory that is waited for only when its values are read."""

    def __init__(self, tensor: Tensor, runtime: Any) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done = runtime.Event()
        self._done.record()

    def tolist(self) -> list[Any]:
        self._done.synchronize()
        return self._host.tolist()

    def numpy(self) -> np.ndarray:
        self._done.synchronize()
        return self._host.numpy()
