"""The kernels of deterministic engines with their production constants, for `builds.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# name, kernel, constants, warps
Launch = tuple[str, Any, dict[str, Any], int]
TYPES = {
    "part_ptr": "*fp32", "part_max_ptr": "*fp32", "part_sum_ptr": "*fp32", "table_ptr": "*i32",
    "seq_len_ptr": "*i32", "q_start_ptr": "*i32", "arrived_ptr": "*i32", "expert_ptr": "*i32",
    "scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32",
}  # fmt: skip


def launches(shared_bytes: int) -> Iterator[Launch]:
    yield from _attention(shared_bytes)
    yield from _products(shared_bytes)
    from nanovllm.kernels.triton import ordered_experts as experts

    for gated, num_outs, depth in ((True, 768, 2048), (False, 2048, 768)):
        constants = experts.pair_constants(8, num_outs, depth, gated) | {"UPCAST": False}
        yield f"ordered pairs {num_outs}x{depth}", experts.ordered_pairs_kernel, constants, 4


def _attention(shared_bytes: int) -> Iterator[Launch]:
    """Heads of 128 in groups of 2 and 8, of 256, and of 64 within a window; one row, many, and a
    prompt."""
    from nanovllm.kernels.triton import ordered_attention as ordered

    cases = (
        (16, 8, 128, 64, 1, 1, 0), (32, 4, 128, 64, 256, 1, 0), (8, 4, 256, 64, 256, 1, 0),
        (14, 2, 64, 16, 16, 8, 4096),
    )  # fmt: skip
    for num_heads, num_kv_heads, head_dim, block_size, num_rows, max_q_len, window in cases:
        decodes = max_q_len == 1
        tile = ordered.ordered_tile(
            num_rows, num_kv_heads, head_dim, 16, decodes, 132, shared_bytes
        )
        constants = ordered.ordered_constants(
            num_heads, num_kv_heads, head_dim, block_size, num_rows, window
        )
        strides: dict[str, Any] = {
            "Q_STRIDE_TOKEN": num_heads * head_dim,
            "Q_STRIDE_HEAD": head_dim,
        }
        for cache in "KV":
            slot = num_kv_heads * head_dim
            strides |= {f"{cache}_STRIDE_HEAD": head_dim, f"{cache}_STRIDE_SLOT": slot}
            strides[f"{cache}_STRIDE_BLOCK"] = block_size * slot
        constants |= strides | {
            "QUERIES": 64, "PIECES": 16, "STAGES": tile.num_stages, "DECODES": decodes,
            "SPLITS": tile.workers > 1, "ONE_ROW": num_rows == 1, "UPCAST": False,
        }  # fmt: skip
        step = "decode" if decodes else "prefill"
        name = f"ordered attention: {step} {num_rows} rows of {num_heads} heads of {head_dim}"
        num_warps = ordered.warps_of(head_dim)
        yield name, ordered.ordered_attention_kernel, constants, num_warps


def _products(shared_bytes: int) -> Iterator[Launch]:
    """Products of Qwen3-0.6B and 8B for one row, for those of a decode step and of a prompt."""
    from nanovllm.kernels.triton import ordered_gemm as ordered

    cases = (
        (1024, 3072, False, 1), (1024, 2048, False, 256), (6144, 1024, True, 64),
        (24576, 4096, True, 8192), (4096, 12288, False, 256), (1024, 3072, False, 8192),
    )  # fmt: skip
    for num_lines, depth, silu_mul, num_rows in cases:
        tile = ordered.ordered_tile(num_rows, num_lines, depth, shared_bytes, 132)
        constants = ordered.ordered_constants(num_rows, num_lines, depth, silu_mul, tile)
        constants |= {"HAS_BIAS": False, "HAS_RESIDUAL": not silu_mul, "UPCAST": False}
        name = f"ordered product {num_rows}x{num_lines}x{depth}"
        yield name, ordered.ordered_gemm_kernel, constants, tile.num_warps
