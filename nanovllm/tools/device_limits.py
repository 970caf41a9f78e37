"""Measured limits of a device: its copy bandwidth and its matrix rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Bytes to copy and rows of the square matrices. Fast devices use the second size.
COPY_BYTES = (1 << 29, 1 << 32)
MATRIX_SIZES = (1024, 8192)
Work = Callable[[], object]
LONG_ENOUGH = 1e-3  # seconds: the host's overhead of about 10 µs is 1 % of this
REPEATS = 6


@dataclass(frozen=True)
class DeviceLimits:
    """`bandwidth` in bytes per second (reads plus writes), `flops` in operations per second."""

    bandwidth: float
    flops: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The shortest time in which the device can move these bytes and do these operations."""
        return max(num_bytes / self.bandwidth, flops / self.flops)


def best_seconds(work: Work, synchronize: Callable[[], None]) -> float:
    """The shortest wall-clock time of `REPEATS` runs, from an idle device to an idle device."""
    best = float("inf")
    for _ in range(REPEATS):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def measure_limits(
    device: torch.device,
    dtype: torch.dtype,
    synchronize: Callable[[], None],
    free_bytes: float = float("inf"),
) -> DeviceLimits:
    """Time a copy of random fp32 values, and a product of square random matrices of `dtype`.

    Each is timed with `best_seconds`: first at the smaller size, then, if that took less than
    `LONG_ENOUGH`, at the larger size. Sizes are halved until they fit half of `free_bytes`, the
    device's free memory. `synchronize` waits until the device is idle.

    The copy is not captured in a CUDA graph: a graph copies 1 GiB or more with the copy engine,
    which reaches two thirds of the bandwidth on an H200. The matrices are random because a GPU's
    clock depends on the power, and the power on the data.
    """

    def copy(num_bytes: int) -> tuple[int, Work]:
        source = torch.randn(num_bytes // 4, device=device)
        target = torch.empty_like(source)
        return 2 * num_bytes, lambda: target.copy_(source)

    def product(size: int) -> tuple[int, Work]:
        a = torch.randn(size, size, device=device, dtype=dtype)
        return 2 * size**3, lambda: a @ a

    def rate(
        make: Callable[[int], tuple[int, Work]],
        sizes: Sequence[int],
        bytes_of: Callable[[int], int],
    ) -> float:
        best = 0.0
        for size in dict.fromkeys(_fitting(size, bytes_of, free_bytes) for size in sizes):
            amount, work = make(size)
            seconds = best_seconds(work, synchronize)
            del work  # free its tensors before the larger ones are allocated
            best = max(best, amount / seconds)
            if seconds > LONG_ENOUGH:
                break
        return best

    bandwidth = rate(copy, COPY_BYTES, lambda num_bytes: 2 * num_bytes)
    return DeviceLimits(
        bandwidth, rate(product, MATRIX_SIZES, lambda n: 2 * n * n * dtype.itemsize)
    )


def _fitting(size: int, bytes_of: Callable[[int], int], free_bytes: float) -> int:
    while size > 8 and bytes_of(size) > free_bytes / 2:
        size //= 2
    return size
