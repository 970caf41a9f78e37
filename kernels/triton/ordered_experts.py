"""Experts of deterministic engines in Triton: one chain of sums for one token and for many.

Many tokens are sorted into groups. In grouped_gemm.py the weights are the left operand of the
matrix units, and the sum of an output is one chain along the depth, whatever the rows of a tile.
Pairs of few tokens are not sorted: each is a tile with one row, by the same chain. A token's
results are added in the order of its choice.

Shapes: P pairs of a token and an expert | L lines of weights of one program | C columns of a chunk
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton import grouped_gemm
from nanovllm.kernels.triton.common import (
    dot,
    finish,
    launch_options,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)
from nanovllm.kernels.triton.moe_sort import combine

LEAST_ROWS = 16  # for fewer Triton takes another instruction
PAIRS_PER_EXPERT = 0.25  # up to so many pairs are not sorted
LINES, COLUMNS, STAGES = 64, 128, 4


@triton.jit
def ordered_pairs_kernel(
    x_ptr,  # [T, D] or, unless BY_TOKEN, [P, D]
    weight_ptr,  # [E, NUM_OUTS, D], or [E, 2 · NUM_OUTS, D] if GATED
    expert_ptr,  # [P]
    scale_ptr,  # [P] fp32, read unless GATED
    out_ptr,  # [P, NUM_OUTS], written
    x_stride,
    TOP_K: tl.constexpr,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    OUTS: tl.constexpr = LINES // 2 if GATED else LINES
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    pair = tl.program_id(1)
    expert = tl.load(expert_ptr + pair).to(tl.int64)
    d_C = tl.arange(0, COLUMNS)
    real_T = tl.arange(0, ROWS) == 0  # the other rows are zeros
    out = tl.program_id(0) * OUTS
    i_L = tl.arange(0, LINES)
    if GATED:  # 8 rows of gate, the same 8 of up, and on
        line_L = tl.minimum(out + i_L // 16 * 8 + i_L % 8, NUM_OUTS - 1) + i_L // 8 % 2 * NUM_OUTS
    else:
        line_L = tl.minimum(out + i_L, NUM_OUTS - 1)
    SIZE: tl.constexpr = (2 if GATED else 1) * NUM_OUTS * DEPTH
    w_at = weight_ptr + expert * SIZE + line_L[:, None] * DEPTH + d_C[None, :]
    row = pair // TOP_K if GATED else pair
    x_at = x_ptr + row * x_stride + real_T.to(tl.int32)[:, None] * 0 + d_C[None, :]
    acc_LT = tl.zeros((LINES, ROWS), tl.float32)
    for chunk in tl.range(0, (DEPTH + COLUMNS - 1) // COLUMNS, num_stages=STAGES):
        real_C = chunk * COLUMNS + d_C < DEPTH
        x_TC = tl.load(x_at + chunk * COLUMNS, mask=real_T[:, None] & real_C[None, :], other=0.0)
        if DEPTH % COLUMNS == 0:
            w_LC = tl.load(w_at + chunk * COLUMNS)
        else:
            w_LC = tl.load(w_at + chunk * COLUMNS, mask=real_C[None, :], other=0.0)
        acc_LT = dot(w_LC, tl.trans(x_TC), acc_LT, UPCAST)
    if GATED:
        pairs = tl.permute(tl.reshape(acc_LT, (LINES // 16, 2, 8, ROWS)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        y_OT = tl.reshape(finish(gate, up, dtype, True), (OUTS, ROWS))
    else:
        y_OT = (acc_LT * tl.load(scale_ptr + pair)).to(dtype)
    o_O = out + tl.arange(0, OUTS)
    out_at = out_ptr + pair.to(tl.int64) * NUM_OUTS + o_O
    mask_OT = (o_O < NUM_OUTS)[:, None] & real_T[None, :]
    tl.store(out_at[:, None] + real_T.to(tl.int32)[None, :] * 0, y_OT, mask=mask_OT)


def pair_constants(top_k: int, num_outs: int, depth: int, gated: bool) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    sizes = {"ROWS": LEAST_ROWS, "LINES": LINES, "COLUMNS": COLUMNS, "STAGES": STAGES}
    return {"TOP_K": top_k, "NUM_OUTS": num_outs, "DEPTH": depth, "GATED": gated, **sizes}


def _of_pairs(
    x: Tensor, weight_EOD: Tensor, expert_TK: Tensor, scale_TK: Tensor, gated: bool
) -> Tensor:
    """The product of each pair with its expert's weights: [P, outputs]."""
    (_, num_lines, depth), num_pairs = weight_EOD.shape, expert_TK.numel()
    num_outs = num_lines // 2 if gated else num_lines
    out_PO = torch.empty((num_pairs, num_outs), dtype=x.dtype, device=x.device)
    ordered_pairs_kernel[(triton.cdiv(num_lines, LINES), num_pairs)](
        x,
        weight_EOD,
        expert_TK,
        scale_TK,
        out_PO,
        x.stride(0),
        **pair_constants(expert_TK.shape[1], num_outs, depth, gated),
        UPCAST=x.device.type != "cuda",
        num_warps=4,
        **launch_options(x.device),
    )
    return out_PO


def ordered_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`reference.experts.experts` of bf16 and fp16, with all experts here.

    Raises ValueError for what it does not take.
    """
    dtype = x_TD.dtype
    tensors = (weight_TK, expert_TK, gate_up_EGD, down_EDF)
    is_same = dtype == gate_up_EGD.dtype == down_EDF.dtype
    dense = all(tensor.is_contiguous() for tensor in tensors) and local_X is None
    if dtype not in (torch.bfloat16, torch.float16) or not is_same or not dense or not len(x_TD):
        raise ValueError(
            f"ordered_experts takes contiguous weights of all experts in bf16 or fp16, not {dtype} "
            f"with {gate_up_EGD.dtype} and {down_EDF.dtype}"
        )
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    residual_TD = None if residual_TD is None else residual_TD.contiguous()
    pairs_each = expert_TK.numel() / gate_up_EGD.shape[0]
    if len(x_TD) == 1 or pairs_each <= PAIRS_PER_EXPERT:
        inner_PF = _of_pairs(x_TD, gate_up_EGD, expert_TK, weight_TK, True)
        y_PD = _of_pairs(inner_PF, down_EDF, expert_TK, weight_TK, False)
        return combine(y_PD, expert_TK, residual_TD)
    shared_bytes = shared_memory_bytes(x_TD.device)
    gated = grouped_gemm.grouped_tile(pairs_each, True, 2, shared_bytes)
    down = grouped_gemm.grouped_tile(pairs_each, False, 2, shared_bytes)
    tiles = gated, down._replace(rows=max(LEAST_ROWS, down.rows))
    return grouped_gemm.grouped_experts(
        x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD, tiles=tiles
    )
