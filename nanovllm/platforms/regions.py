"""Device memory that a sleeping engine frees: a region for weights, one for the cache."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanovllm.kernels import recorded

Place = Callable[[Tensor], Tensor]  # moves a new tensor to separate memory


class Region:
    """Memory for tensors. This one cannot be freed for sleep: `problem` has the reason."""

    def __init__(self, device: torch.device, problem: str = "") -> None:
        self.device, self.problem = device, problem

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it in this region. The caller drops the original."""
        return tensor

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def refill(self) -> Place:
        """A function like `place` that copies into the placed tensors, in their order."""
        raise ValueError(self.problem)

    def drop(self, *, keep: bool) -> None:
        """Free the device memory. `keep` first moves the contents to the host.

        If it is already freed, keep=False drops the contents on the host. The device must be idle.
        Raises ValueError if the region cannot be freed.
        """
        raise ValueError(self.problem)

    def take_back(self) -> bool:
        """Allocate the memory again. False: the contents are lost, and the caller must rewrite
        them.

        Raises torch.OutOfMemoryError; the memory then stays freed.
        """
        return True

    def clear(self) -> None:
        """Fill all tensors with zeros."""

    def close(self) -> None:
        """Free the memory permanently. Its tensors must not be used afterwards."""


class SplitRegion(Region):
    """A region for weights that are partly in host memory and are read there.

    This one is for devices that compute in host memory.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, "sleep is not supported with expert_offload")

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor in host memory, for the processor. It stays as long as the region.

        Raises torch.OutOfMemoryError.
        """
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def seen(self, tensor: Tensor) -> Tensor:
        """The memory of a tensor of `host_empty` as a tensor of the device."""
        return tensor


class TensorRegion(Region):
    """A region that records its tensors in order of creation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._tensors: list[Tensor] = []

    def place(self, tensor: Tensor) -> Tensor:
        self._tensors.append(tensor)
        return tensor

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.place(super().zeros(shape, dtype))

    def refill(self) -> Place:
        targets = iter(self._tensors)

        def copied(tensor: Tensor) -> Tensor:
            target = next(targets)
            assert target.shape == tensor.shape and target.dtype == tensor.dtype
            return target.copy_(tensor)

        return copied

    def clear(self) -> None:
        for tensor in self._tensors:
            tensor.zero_()

    def close(self) -> None:
        self._tensors.clear()


class HostRegion(TensorRegion):
    """Tensors in host memory: freed and allocated again, at other addresses.

    Recorded steps are told, and nothing else keeps addresses. Contents to keep stay in place.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._sizes: list[int] = []  # bytes of the freed storages

    def drop(self, *, keep: bool) -> None:
        if keep or self._sizes:
            return
        recorded.moved()
        storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._sizes = [storage.nbytes() for storage in storages]
        for storage in storages:
            storage.resize_(0)
        _trim()

    def take_back(self) -> bool:
        if not self._sizes:
            return True
        try:
            recorded.moved()
            for tensor, size in zip(self._tensors, self._sizes):
                tensor.untyped_storage().resize_(size)
        except RuntimeError as error:
            for tensor in self._tensors:
                tensor.untyped_storage().resize_(0)
            raise torch.OutOfMemoryError(str(error)) from error
        self._sizes = []
        return False


def _trim() -> None:
    """Make glibc return freed memory to the system, which it otherwise does only for large
    blocks."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries lack it
        if trim is not None:
            trim(0)
