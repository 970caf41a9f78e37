"""Apple GPUs through torch's MPS backend: eager, every op as the plain torch of `kernels/reference.py`.

There is no lowering and no capture, and attention is matmul and softmax: scaled_dot_product_attention has given wrong
results there for one query against many keys, which is what a decode step is. Nothing here makes a float64 tensor, which
the device does not have. Sampling hashes in int64, for whose products, shifts and masks torch declares kernels.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.program import Lowering, Pass
from nanovllm.platforms.base import HostCopy, MemoryBudget, Rehearsal, Replay

logger = logging.getLogger(__name__)


def problem() -> str | None:
    """Why this machine has no MPS device, or None where it has one."""
    if not torch.backends.mps.is_built():
        return (
            "this build of torch is without MPS support (wheels for macOS on Apple silicon have it)"
        )
    if not torch.backends.mps.is_available():
        return "torch sees no MPS device: it takes Apple silicon and macOS 14 or later"
    return None


class MpsPlatform:
    """`device` is another one in tests alone, where the same policy runs on a CPU's tensors."""

    name = "mps"
    default_block_size = 16
    # Memory is shared with all other programs, and what is free says little: a fixed size that suits a small machine.
    default_cache_blocks: int | None = 1024
    default_batched_tokens = 512
    default_num_seqs = 16
    run_ahead = 0
    measures_scratch = False
    whole_steps = False
    wants_lengths = False
    max_stall_ms = math.inf
    quantizations: tuple[str, ...] = ()
    supports_fp8_cache = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("mps")
        self._is_real = self.device.type == "mps"
        self.supported_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
        if not self._is_real or torch.backends.mps.is_macos_or_newer(14, 0):
            self.supported_dtypes += (torch.bfloat16,)

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.supported_dtypes)
        logger.debug(
            "mps on %s: ops as plain torch, attention as matmul and softmax, dtypes %s",
            self.device,
            dtypes,
        )

    def lowering(self) -> tuple[Lowering | None, str]:
        return None, "graphs are not lowered on mps: every step runs eagerly, as plain torch"

    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        return ()

    def fingerprint(self) -> dict[str, str]:
        return {"mps": "eager"}

    def compile_workers(self, bytes_each: int, bytes_own: int) -> int:
        return 0

    def rehearsal(self) -> Rehearsal | None:
        return None

    def kernels_compiled(self) -> list[str]:
        return []

    def announce(self, seq_lens: list[int]) -> None:
        pass

    def capture(self, step: Callable[[], None]) -> Replay:
        return step

    def upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self.device)

    def write(self, target: Tensor, values: Any) -> None:
        target.copy_(torch.as_tensor(values, dtype=target.dtype))

    def read_back(self, tensor: Tensor) -> HostCopy:
        return tensor.to("cpu", copy=True)

    def cache_limit_bytes(self) -> int:
        """What the driver recommends as the most, less what is taken."""
        if self._is_real:
            return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def memory_budget(self, utilization: float) -> MemoryBudget:
        return MemoryBudget(int(utilization * self.cache_limit_bytes()), scratch_bytes=0)

    def used_bytes(self) -> int:
        return torch.mps.driver_allocated_memory() if self._is_real else 0

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return (
            self.used_bytes()
        )  # the driver keeps no peak, and torch gives nothing back before `release`

    def synchronize(self) -> None:
        if self._is_real:
            torch.mps.synchronize()

    def release(self) -> None:
        if self._is_real:
            torch.mps.empty_cache()
