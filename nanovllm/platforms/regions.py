"""Device memory that a sleeping engine gives back: a region for its weights, one for its cache."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Place = Callable[[Tensor], Tensor]  # moves a new tensor to memory of its own


class Region:
    """Memory for tensors. This one cannot be given back: `problem` says why."""

    def __init__(self, device: torch.device, problem: str = "") -> None:
        self.device, self.problem = device, problem

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it in this region. The caller gives the original up."""
        return tensor

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def refill(self) -> Place:
        """A function like `place` that copies into the placed tensors, in their order."""
        raise ValueError(self.problem)

    def drop(self, *, keep: bool) -> None:
        """Give the memory back to the device. `keep` moves the contents to the host before that.

        If it was given back already, keep=False drops the contents on the host. The device must be
        idle. Raises ValueError if the region cannot be given back.
        """
        raise ValueError(self.problem)

    def take_back(self) -> bool:
        """Take the memory again. False: the contents are lost, and the caller writes them anew.

        Raises torch.OutOfMemoryError. The memory stays given back then.
        """
        return True

    def clear(self) -> None:
        """Fill all tensors with zeros."""

    def close(self) -> None:
        """Free the memory for good. Nothing may use its tensors after that."""


class SplitRegion(Region):
    """A region for weights of which a part lies in the host's memory and is read there.

    This one is for devices that compute in the host's memory.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, "sleep is not supported with expert_offload")

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor in the host's memory, for the processor. It lives as long as the region.

        Raises torch.OutOfMemoryError.
        """
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def seen(self, tensor: Tensor) -> Tensor:
        """The memory of a tensor of `host_empty` as a tensor of the device."""
        return tensor


class TensorRegion(Region):
    """A region that knows its tensors, in the order in which they were made."""

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
    """Tensors in the host's memory: freed and allocated again, at other addresses.

    On a CPU nothing keeps addresses between two steps. Contents to keep stay where they are.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._sizes: list[int] = []  # bytes of the storages that were freed

    def drop(self, *, keep: bool) -> None:
        if keep or self._sizes:
            return
        storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._sizes = [storage.nbytes() for storage in storages]
        for storage in storages:
            storage.resize_(0)
        _trim()

    def take_back(self) -> bool:
        if not self._sizes:
            return True
        try:
            for tensor, size in zip(self._tensors, self._sizes):
                tensor.untyped_storage().resize_(size)
        except RuntimeError as error:
            for tensor in self._tensors:
                tensor.untyped_storage().resize_(0)
            raise torch.OutOfMemoryError(str(error)) from error
        self._sizes = []
        return False


def _trim() -> None:
    """Let glibc return freed memory to the system, which it does at once for large blocks only."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries lack it
        if trim is not None:
            trim(0)
