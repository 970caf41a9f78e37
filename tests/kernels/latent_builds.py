"""Launches of the kernels of latent attention, and of the choice from groups, for `builds.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from nanovllm.kernels.triton import group_topk
from nanovllm.kernels.triton import latent_decode as decode
from nanovllm.kernels.triton import latent_inputs as inputs
from nanovllm.kernels.triton import latent_prefill as prefill

LATENT, ROTATED, BLOCK, ROWS = 512, 64, 64, 64
ROUTER = {"logits_ptr": "*fp32", "expert_ptr": "*i32", "bias_ptr": "*fp32", "weight_ptr": "*fp32"}


class Launch(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    dtype: str = "bf16"
    types: dict[str, str] | None = None


def launches(shared_bytes: int, has_matrix_units: bool, whole: bool) -> Iterator[Launch]:
    """Those of DeepSeek-V2-Lite; with `whole` also those of DeepSeek-V3 and GLM-4.7-Flash. GPUs
    without matrix units refuse latents (`Traits.supports_latents`)."""
    cases = ((16, "bf16"), (128, "bf16"), (20, "bf16"), (16, "fp32"))
    for num_heads, dtype in cases if whole else cases[: 1 if has_matrix_units else 0]:
        yield from _attention(num_heads, dtype, shared_bytes)
    constants = inputs.inputs_constants(128, LATENT, ROTATED)
    yield Launch("latent_inputs", inputs.latent_inputs_kernel, constants, 4)
    for num_experts, num_groups, top_k in ((256, 8, 8), (64, 1, 6))[: 2 if whole else 1]:
        sizes = group_topk.group_constants(num_experts, num_groups, max(1, num_groups // 2))
        constants = sizes | {
            "TOP_K": top_k, "GROUP_SCORES": 2, "SIGMOID": num_groups > 1,
            "HAS_BIAS": num_groups > 1, "NORMALIZE": True,
        }  # fmt: skip
        name = f"group_topk {top_k} of {num_experts}"
        yield Launch(name, group_topk.group_topk_kernel, constants, 1, types=ROUTER)


def _attention(num_heads: int, dtype: str, shared_bytes: int) -> Iterator[Launch]:
    is_fp32 = dtype == "fp32"
    name, entry_bytes = f"latents {num_heads} heads {dtype}", 576 * (4 if is_fp32 else 2)
    sizes = decode.latent_constants(num_heads, LATENT, ROTATED)
    strides: dict[str, Any] = {
        "Q_STRIDE_ROW": num_heads * 576, "Q_STRIDE_TOKEN": num_heads * 576, "Q_STRIDE_HEAD": 576,
        "STRIDE_BLOCK": BLOCK * 576, "STRIDE_SLOT": 576, "UPCAST": False,
    }  # fmt: skip
    padded_bytes = (sizes["LATENT_P"] + sizes["ROTATED_P"]) * entry_bytes // 576
    tile = decode.decode_tile(num_heads, padded_bytes, is_fp32, shared_bytes)
    constants = sizes | strides | decode.decode_constants(tile, BLOCK, ROWS)
    yield Launch(
        f"{name}: decode", decode.latent_decode_kernel, constants, tile.num_warps,
        tile.num_stages, dtype,
    )  # fmt: skip
    yield Launch(f"{name}: merge", decode.latent_merge_kernel, constants, 4, dtype=dtype)
    tile = prefill.prefill_tile(num_heads, padded_bytes, is_fp32, shared_bytes)
    queries = prefill.num_queries(tile, 4096, is_fp32, shared_bytes)
    constants = sizes | strides | prefill.prefill_constants(tile, queries, BLOCK, ROWS)
    yield Launch(
        f"{name}: prefill", prefill.latent_prefill_kernel, constants, tile.num_warps,
        tile.num_stages, dtype,
    )  # fmt: skip
