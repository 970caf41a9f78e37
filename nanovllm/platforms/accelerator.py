"""What CUDA and NPUs have in common: asynchronous copies by way of pinned memory, and torch's accounts of device memory.

torch_npu has the functions of `torch.cuda` under `torch.npu`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from nanovllm.platforms.base import HostCopy, MemoryBudget, budget


class Accelerator(ABC):
    """A base of platforms."""

    device: torch.device

    @property
    @abstractmethod
    def runtime(self) -> Any:
        """The module with the device's functions: torch.cuda or torch.npu."""

    def upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        # the pinned allocator keeps the buffer until the copy has run
        return torch.as_tensor(values, dtype=dtype).pin_memory().to(self.device, non_blocking=True)

    def write(self, target: Tensor, values: Any) -> None:
        target.copy_(torch.as_tensor(values, dtype=target.dtype).pin_memory(), non_blocking=True)

    def read_back(self, tensor: Tensor) -> HostCopy:
        return _PinnedCopy(tensor, self.runtime)

    def memory_budget(self, utilization: float) -> MemoryBudget:
        free_bytes, total_bytes = self.runtime.mem_get_info(self.device)
        stats = self.runtime.memory_stats(self.device)
        return budget(
            utilization,
            free_bytes=free_bytes,
            total_bytes=total_bytes,
            reserved_bytes=stats["reserved_bytes.all.current"],
            allocated_bytes=stats["allocated_bytes.all.current"],
            peak_bytes=stats["allocated_bytes.all.peak"],
        )

    def cache_limit_bytes(self) -> int:
        free_bytes, _ = self.runtime.mem_get_info(self.device)
        cached_bytes = self.runtime.memory_reserved(self.device) - self.runtime.memory_allocated(
            self.device
        )
        return int(free_bytes + cached_bytes)

    def used_bytes(self) -> int:
        free_bytes, total_bytes = self.runtime.mem_get_info(self.device)
        return int(total_bytes - free_bytes)

    def reset_peak(self) -> None:
        self.runtime.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        return int(self.runtime.max_memory_allocated(self.device))


class _PinnedCopy:
    """A copy to the host that is waited for only when it is looked at."""

    def __init__(self, tensor: Tensor, runtime: Any) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done = runtime.Event()
        self._done.record()

    def tolist(self) -> list[Any]:
        self._done.synchronize()
        return self._host.tolist()
