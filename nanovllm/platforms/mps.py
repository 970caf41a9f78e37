"""Apple GPUs through torch's MPS backend: eager, with the plain torch of `kernels/reference/`.

There is no lowering and no capture. Attention is matmul and softmax, because on MPS
scaled_dot_product_attention has given wrong results for one query and many keys, as in decode. MPS
has no float64, so this file makes no float64 tensors. Sampling hashes in int64; torch declares MPS
kernels for the products, shifts and masks that it needs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanovllm.compile.program import Lowering, Pass
from nanovllm.platforms.base import MemoryBudget, Platform, Traits

logger = logging.getLogger(__name__)


TRAITS = Traits(
    name="mps",
    supported_dtypes=(torch.float32, torch.float16),
    block_size=16,
    # fixed, and small enough for a small machine: free memory depends on other programs
    cache_blocks=1024,
    batched_tokens=512,
    num_seqs=16,
)


def problem(index: int) -> str | None:
    if not torch.backends.mps.is_built():
        return "this build of torch is without MPS support (macOS wheels for Apple silicon have it)"
    if not torch.backends.mps.is_available():
        return "torch finds no MPS device: it needs Apple silicon and macOS 14 or later"
    return None


def create(index: int, options: Mapping[str, Any]) -> MpsPlatform:
    return MpsPlatform()


class MpsPlatform(Platform):
    """Tests pass another `device`, to run this platform on CPU tensors."""

    def __init__(self, device: torch.device | None = None) -> None:
        device = device or torch.device("mps")
        self._is_real = device.type == "mps"
        has_bfloat16 = not self._is_real or torch.backends.mps.is_macos_or_newer(14, 0)
        bfloat16 = (torch.bfloat16,) if has_bfloat16 else ()
        dtypes = TRAITS.supported_dtypes + bfloat16
        super().__init__(device, replace(TRAITS, supported_dtypes=dtypes))

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        names = (str(dtype).removeprefix("torch.") for dtype in self.traits.supported_dtypes)
        message = "mps on %s: ops as plain torch, attention as matmul and softmax, dtypes %s"
        logger.debug(message, self.device, ", ".join(names))

    def lowering(self) -> tuple[Lowering | None, str]:
        return None, "graphs are not lowered on mps: every step runs eagerly, as plain torch"

    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        return ()

    def fingerprint(self) -> dict[str, str]:
        return {"mps": "eager"}

    def cache_limit_bytes(self) -> int:
        """The driver's recommended maximum, minus the memory in use."""
        if self._is_real:
            return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def memory_budget(self, utilization: float) -> MemoryBudget:
        return MemoryBudget(int(utilization * self.cache_limit_bytes()), scratch_bytes=0)

    def used_bytes(self) -> int:
        # also the peak: the driver has no counter, and torch frees nothing before `release`
        return torch.mps.driver_allocated_memory() if self._is_real else 0

    def synchronize(self) -> None:
        if self._is_real:
            torch.mps.synchronize()

    def release(self) -> None:
        if self._is_real:
            torch.mps.empty_cache()
