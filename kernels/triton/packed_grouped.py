"""Products of sorted pairs with the packed weights of their experts in Triton.

As in `grouped_gemm.py`, with the sums of `packed_chunks.py`.

Shapes: T tokens | P pairs | E experts | D depth | O weight rows | L weight rows of a tile
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import (
    launch_options,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)
from nanovllm.kernels.triton.grouped_gemm import BY_PAIR, BY_PLACE, BY_TOKEN, _group_of
from nanovllm.kernels.triton.moe_sort import Groups
from nanovllm.kernels.triton.packed_chunks import columns_of, lines_of, packed_sums, results_of
from nanovllm.kernels.triton.packed_codes import Codes
from nanovllm.kernels.triton.packed_tiles import PackedGemmTile, grouped_tile


@triton.jit
def packed_grouped_kernel(
    x_ptr,  # [T, D], [P, D] or, by place, [P, D] in the order of the sorted pairs
    code_ptr,  # [E, O, C]
    scale_ptr,  # [E, R, G]
    offset_ptr,  # [E, R, G], read if HAS_OFFSET
    table_ptr,
    pair_ptr,  # [P]
    start_ptr,  # [E + 1]
    factor_ptr,  # [P] fp32, read if HAS_FACTOR
    bias_ptr,  # [E, O], None unless HAS_BIAS
    out_ptr,  # [P, NUM_OUTS], written
    x_stride,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
    STAGES: tl.constexpr,
    X_BY: tl.constexpr,
    OUT_BY: tl.constexpr,
    SILU_MUL: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    OUTS: tl.constexpr = LINES // 2 if SILU_MUL else LINES
    NUM_LINES: tl.constexpr = NUM_OUTS * 2 if SILU_MUL else NUM_OUTS
    SCALES: tl.constexpr = ((NUM_LINES + GROUP_ROWS - 1) // GROUP_ROWS) * NUM_GROUPS
    HALF: tl.constexpr = COLUMNS * BITS // 8
    tile = tl.program_id(1)
    expert, earlier = _group_of(start_ptr, tile, NUM_EXPERTS, EXPERTS_P, ROWS)
    if expert >= NUM_EXPERTS:
        return
    end = tl.load(start_ptr + expert + 1)
    place_T = tl.load(start_ptr + expert) + (tile - earlier) * ROWS + tl.arange(0, ROWS)
    real_T = place_T < end
    pair_T = tl.load(pair_ptr + place_T, mask=real_T, other=0)
    row_T = pair_T // TOP_K if X_BY == BY_TOKEN else pair_T if X_BY == BY_PAIR else place_T
    out_T = place_T if OUT_BY == BY_PLACE else pair_T

    first = tl.program_id(0) * OUTS
    line_L = lines_of(first, NUM_OUTS, LINES, SILU_MUL)
    at = expert.to(tl.int64)
    x_at = x_ptr + row_T.to(tl.int64)[:, None] * x_stride + columns_of(HALF, BITS)[None, :]
    acc_LT = packed_sums(
        tl.zeros((LINES, ROWS), tl.float32), code_ptr + at * (NUM_LINES * (DEPTH * BITS // 8)),
        scale_ptr + at * SCALES, offset_ptr + at * SCALES, table_ptr, x_at, first, line_L, real_T,
        0, dtype, DEPTH // (COLUMNS * EACH), DEPTH, BITS, FORM, GROUP, GROUP_ROWS, NUM_GROUPS,
        HAS_OFFSET, COLUMNS, EACH, STAGES, NUM_OUTS if SILU_MUL else 0, LINES, False, UPCAST,
    )  # fmt: skip
    if HAS_BIAS:
        acc_LT += tl.load(bias_ptr + expert * NUM_LINES + line_L).to(tl.float32)[:, None]
    if HAS_FACTOR:
        acc_LT *= tl.load(factor_ptr + pair_T, mask=real_T, other=0.0)[None, :]
    y_TO = tl.trans(results_of(acc_LT, dtype, SILU_MUL, ALPHA, LIMIT))
    o_O = first + tl.arange(0, OUTS)
    tl.store(
        out_ptr + out_T.to(tl.int64)[:, None] * NUM_OUTS + o_O[None, :],
        y_TO,
        mask=real_T[:, None] & (o_O < NUM_OUTS)[None, :],
    )


def grouped_constants(
    num_outs: int, depth: int, codes: Codes, silu_mul: bool, tile: PackedGemmTile, top_k: int
) -> dict[str, Any]:
    """The kernel's constants that depend on the weights and the tile."""
    num_experts = codes.code.shape[0]
    return codes.constants() | {
        "NUM_EXPERTS": num_experts,
        "EXPERTS_P": triton.next_power_of_2(num_experts),
        "TOP_K": top_k,
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "ROWS": tile.rows,
        "LINES": tile.lines,
        "COLUMNS": tile.columns,
        "EACH": tile.each,
        "STAGES": tile.num_stages,
        "SILU_MUL": silu_mul,
    }


def packed_grouped(
    x_PD: Tensor,
    codes: Codes,
    groups: Groups,
    top_k: int,
    factor_TK: Tensor | None = None,
    *,
    x_by: int,
    out_by: int,
    silu_mul: bool = False,
    launch: PackedGemmTile | None = None,
    bias_EO: Tensor | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> Tensor:
    """x · weightᵀ for the rows of every expert: see `grouped_gemm.grouped_gemm`."""
    depth, device = x_PD.shape[1], x_PD.device
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    num_pairs, num_experts = groups.pair_P.shape[0], codes.code.shape[0]
    shared_bytes = shared_memory_bytes(device)
    tile = launch or grouped_tile(groups.pairs_each, codes, depth, shared_bytes)
    out_PO = torch.empty((num_pairs, num_outs), dtype=x_PD.dtype, device=device)
    # a group of n pairs has at most (n + rows − 1) / rows tiles
    num_tiles = min(num_pairs, num_pairs // tile.rows + num_experts)
    outs = tile.lines // 2 if silu_mul else tile.lines
    packed_grouped_kernel[(triton.cdiv(num_outs, outs), num_tiles)](
        x_PD,
        codes.code,
        *codes.tensors(),
        groups.pair_P,
        groups.start_E1,
        x_PD if factor_TK is None else factor_TK,
        bias_EO,
        out_PO,
        x_PD.stride(0),
        **grouped_constants(num_outs, depth, codes, silu_mul, tile, top_k),
        X_BY=x_by,
        OUT_BY=out_by,
        HAS_FACTOR=factor_TK is not None,
        HAS_BIAS=bias_EO is not None,
        ALPHA=alpha,
        LIMIT=limit,
        UPCAST=device.type != "cuda",
        num_warps=tile.num_warps,
        **launch_options(device),
    )
    return out_PO
