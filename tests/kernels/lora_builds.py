"""Launches of the kernels of adapters, for `builds.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from nanovllm.kernels.reference.lora import tile_tokens
from nanovllm.kernels.triton import adapter_tiles, lora, lora_row, lora_sizes
from nanovllm.kernels.triton.skinny_gemm import kernel_for

TYPES = {"adapter_ptr": "*i64", "order_ptr": "*i64", "tile_ptr": "*i32", "z_ptr": "*fp32"}


class Launch(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    dtype: str


def launches(shared_bytes: int, whole: bool) -> Iterator[Launch]:
    """Those of rank 16 for q, k and v of Qwen3-8B and for SiLU of gate and up, and of one row; with
    `whole` also of other sizes and in fp32."""
    cases = [
        ("qkv", (4096, 1024, 1024), 16, 4096, 256, "bf16", False),
        ("gate and up", (12288, 12288), 16, 4096, 256, "bf16", True),
        ("many tokens", (4096, 1024, 1024), 16, 4096, 8192, "bf16", False),
        ("down", (4096,), 64, 12288, 256, "fp32", False),
        ("largest rank", (4096,), 512, 4096, 256, "bf16", False),
        ("head", (49155,), 16, 4096, 256, "bf16", False),
        ("table", (4096,), 16, 16, 8192, "bf16", False),
    ]
    for name, rows, rank, depth, num_tokens, dtype, silu_mul in cases if whole else cases[:2]:
        upcast, num_bytes = {"UPCAST": False}, 4 if dtype == "fp32" else 2
        num_inner = len(rows) * rank
        sizes = lora_sizes.sizes_of(num_tokens, num_inner, depth, 132, num_bytes)
        constants = lora_sizes.shrink_constants(num_inner, depth, sizes, num_bytes) | upcast
        stages = lora_sizes.shrink_stages(shared_bytes)
        yield Launch(f"lora {name}: shrink", lora.lora_shrink_kernel, constants, 4, stages, dtype)
        constants = lora_sizes.expand_constants(rows, rank, sizes, num_bytes, silu_mul) | upcast
        num_warps = lora_sizes.expand_warps(constants)
        yield Launch(
            f"lora {name}: expand", lora.lora_expand_kernel, constants, num_warps, 3, dtype
        )
    constants = lora_row.row_constants(32, 48, 4096, True)
    yield Launch("lora row: shrink", lora_row.lora_row_kernel, constants, 4, 3, "bf16")
    _, constants, num_warps = kernel_for(1, 12288, 4096, True, False, False, True, False)
    constants = constants | lora_row.end_constants(32, (12288, 12288), 16)
    yield Launch("lora row: product", lora_row.lora_gemv_kernel, constants, num_warps, 3, "bf16")
    for tokens in (16, 256, 1024) if whole else (256,):
        constants = {"TOKENS": tokens, "BLOCK": adapter_tiles.BLOCK, "SIZE": tile_tokens(tokens)}
        kernel, num_warps = adapter_tiles.adapter_tiles_kernel, adapter_tiles.warps(tokens)
        yield Launch(f"adapter tiles of {tokens}", kernel, constants, num_warps, 3, "bf16")
