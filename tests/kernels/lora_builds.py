"""Launches of the kernels of adapters, for `builds.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from nanovllm.kernels.triton import lora

TYPES = {"adapter_ptr": "*i64", "order_ptr": "*i64", "z_ptr": "*fp32"}


class Launch(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    dtype: str


def launches(whole: bool) -> Iterator[Launch]:
    """Those of rank 16 for q, k and v of Qwen3-8B; with `whole` also of one matrix of another rank
    and in fp32."""
    cases = (((4096, 1024, 1024), 16, 512, 8, "bf16"), ((4096,), 64, 4096, 3, "fp32"))
    for rows, rank, split, num_splits, dtype in cases if whole else cases[:1]:
        upcast = {"UPCAST": False}
        constants = lora.shrink_constants(len(rows) * rank, 4096, split) | upcast
        name = f"lora rank {rank} {dtype}"
        yield Launch(f"{name}: shrink", lora.lora_shrink_kernel, constants, 4, dtype)
        constants = lora.expand_constants(rows, rank, num_splits) | upcast
        yield Launch(f"{name}: expand", lora.lora_expand_kernel, constants, 4, dtype)
