"""Experts of many tokens in Triton: pairs sorted by expert, then products of groups of rows.

`moe_sort.py` sorts the pairs. A product's launch has a fixed number of programs, enough for any
routing. Each finds its expert and rows from the sorted lists; programs without rows end at once.
The host reads nothing of the routing, and no token is dropped.

The weights are the left operand of the matrix units, which take it in pieces of 64; a group's rows
are the right operand, which may have as few as 8. In the product with gate and up a tile of weights
alternates between 8 outputs of gate and the same 8 of up, so that a thread holds both factors of
SiLU·up (as in gated_gemm.py). The product with down writes the weighted output of each pair; the
last launch adds them for each token, always in the same order.

Shapes: T tokens | K experts per token | P = T·K pairs | E experts | X experts, with those elsewhere
| D hidden | F expert width | O weight rows of a tile | C columns of a chunk; "p" after a letter:
padded to a power of two
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import (
    NO_CLAMP,
    Clamp,
    Places,
    dot,
    expert_at,
    finish,
    launch_options,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)
from nanovllm.kernels.triton.moe_sort import Groups, combine, sort_pairs

# How a product's rows are found, and where its results go.
BY_TOKEN, BY_PAIR, BY_PLACE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class GroupedTile(NamedTuple):
    """The sizes of a launch: rows and weight rows of one program, columns of a chunk, chunks in
    flight, warps."""

    rows: int
    lines: int
    columns: int
    num_stages: int
    num_warps: int


@triton.jit
def _group_of(start_ptr, tile, NUM_EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr,
              ROWS: tl.constexpr):  # fmt: skip
    """(expert, its first tile) of a tile of rows; expert NUM_EXPERTS or more for tiles without."""
    e_Ep = tl.arange(0, EXPERTS_P)
    real_Ep = e_Ep < NUM_EXPERTS
    start_Ep = tl.load(start_ptr + e_Ep, mask=real_Ep, other=0)
    end_Ep = tl.load(start_ptr + e_Ep + 1, mask=real_Ep, other=0)
    tiles_Ep = (end_Ep - start_Ep + ROWS - 1) // ROWS
    is_before_Ep = tl.cumsum(tiles_Ep, 0) <= tile
    return tl.sum(is_before_Ep.to(tl.int32)), tl.sum(tl.where(is_before_Ep, tiles_Ep, 0))


@triton.jit
def _load(at, chunk, d_C, real_L, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr):
    """Columns of one chunk of lines that begin at `at`; zeros past the depth and for unreal lines.

    With ALL every line is real.
    """
    if DEPTH % COLUMNS == 0 and ALL:
        return tl.load(at + chunk * COLUMNS)
    elif DEPTH % COLUMNS == 0:
        return tl.load(at + chunk * COLUMNS, mask=real_L[:, None], other=0.0)
    else:
        mask_LC = real_L[:, None] & (chunk * COLUMNS + d_C < DEPTH)[None, :]
        return tl.load(at + chunk * COLUMNS, mask=mask_LC, other=0.0)


@triton.jit
def grouped_gemm_kernel(
    x_ptr,  # [T, D], [P, D] or, by place, [P, D] in the order of the sorted pairs
    weight_ptr,  # [E, NUM_OUTS, D], or [E, 2 · NUM_OUTS, D] if GATED
    others_ptr,  # the next three are read if OFFLOADED: see `common.Places`
    first_ptr,
    slot_ptr,
    pair_ptr,  # [P]
    start_ptr,  # [E + 1]
    scale_ptr,  # [P] fp32, read if HAS_SCALE
    bias_ptr,  # [E, weight rows], None unless HAS_BIAS
    out_ptr,  # [P, NUM_OUTS], written
    x_stride,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    X_BY: tl.constexpr,
    OUT_BY: tl.constexpr,
    GATED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    OFFLOADED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    OUTS: tl.constexpr = LINES // 2 if GATED else LINES
    dtype: tl.constexpr = out_ptr.dtype.element_ty
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

    d_C = tl.arange(0, COLUMNS)
    out = tl.program_id(0) * OUTS
    i_O = tl.arange(0, LINES)
    if GATED:  # 8 rows of gate, the same 8 of up, and on
        line_O = tl.minimum(out + i_O // 16 * 8 + i_O % 8, NUM_OUTS - 1) + i_O // 8 % 2 * NUM_OUTS
    else:
        line_O = tl.minimum(out + i_O, NUM_OUTS - 1)
    SIZE: tl.constexpr = (2 if GATED else 1) * NUM_OUTS * DEPTH
    weight_at = expert_at(weight_ptr, others_ptr, first_ptr, slot_ptr, expert, SIZE, OFFLOADED)
    w_at = weight_at + line_O[:, None] * DEPTH + d_C[None, :]
    x_at = x_ptr + row_T.to(tl.int64)[:, None] * x_stride + d_C[None, :]
    acc_OT = tl.zeros((LINES, ROWS), tl.float32)
    for chunk in tl.range(0, (DEPTH + COLUMNS - 1) // COLUMNS, num_stages=STAGES):
        x_TC = _load(x_at, chunk, d_C, real_T, DEPTH, COLUMNS, False)
        w_OC = _load(w_at, chunk, d_C, line_O >= 0, DEPTH, COLUMNS, True)
        acc_OT = dot(w_OC, tl.trans(x_TC), acc_OT, UPCAST)
    if HAS_BIAS:
        bias_at = bias_ptr + expert * ((2 if GATED else 1) * NUM_OUTS) + line_O
        acc_OT += tl.load(bias_at).to(tl.float32)[:, None]
    if GATED:
        pairs = tl.permute(tl.reshape(acc_OT, (LINES // 16, 2, 8, ROWS)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        y_OT = tl.reshape(finish(gate, up, dtype, True, ALPHA, LIMIT), (OUTS, ROWS))
    else:
        if HAS_SCALE:
            acc_OT *= tl.load(scale_ptr + pair_T, mask=real_T, other=0.0)[None, :]
        y_OT = acc_OT.to(dtype)
    o_O = out + tl.arange(0, OUTS)
    tl.store(
        out_ptr + out_T.to(tl.int64)[:, None] * NUM_OUTS + o_O[None, :],
        tl.trans(y_OT),
        mask=real_T[:, None] & (o_O < NUM_OUTS)[None, :],
    )


# Pairs per expert → tiles for the product with gate and up, and for the others. Measured on an H200
# with the experts of Qwen3-30B-A3B (docs/log.md).
TILES = {
    1: (GroupedTile(16, 64, 128, 5, 4), GroupedTile(8, 64, 128, 4, 4)),
    8: (GroupedTile(16, 64, 128, 4, 4), GroupedTile(16, 128, 64, 6, 4)),
    24: (GroupedTile(32, 64, 128, 4, 4), GroupedTile(32, 128, 64, 5, 4)),
    96: (GroupedTile(64, 128, 64, 4, 4), GroupedTile(64, 128, 64, 4, 4)),
}
LARGEST_TILE = GroupedTile(128, 128, 64, 3, 4)


def grouped_tile(
    pairs_each: float, gated: bool, element_bytes: int, shared_bytes: int
) -> GroupedTile:
    """The tile for so many pairs per expert.

    For elements of 4 bytes it is smaller. With less shared memory it has fewer stages.
    """
    found = next((tiles for most, tiles in TILES.items() if pairs_each <= most), None)
    tile = LARGEST_TILE if found is None else found[0 if gated else 1]
    if element_bytes == 4:
        tile = tile._replace(rows=min(tile.rows, 32), lines=64, columns=32)
    stage_bytes = (tile.rows + tile.lines) * tile.columns * element_bytes
    most_stages = (shared_bytes - 2048) // stage_bytes
    return tile._replace(num_stages=max(2, min(tile.num_stages, most_stages)))


def grouped_gemm(
    x: Tensor,
    weight_EOD: Tensor,
    groups: Groups,
    top_k: int,
    scale_TK: Tensor | None = None,
    *,
    x_by: int,
    out_by: int,
    gated: bool = False,
    tile: GroupedTile | None = None,
    places: Places | None = None,
    bias_EO: Tensor | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> Tensor:
    """x · weightᵀ for the rows of every expert: [P, outputs]; silu(gate) · up if `gated`.

    `x_by` and `out_by` select the row of x and of the result for a sorted pair: by its token, its
    pair, or its place. `scale_TK` multiplies the rows of pairs. `tile` overrides
    the measured one. With `places` the weights are those of slots. With a `limit` the activation is
    `reference.norm_act.clamped_swiglu`.
    """
    num_experts, num_lines, depth = weight_EOD.shape
    others, tables = weight_EOD, (groups.start_E1, groups.start_E1)
    if places is not None:
        num_experts, *tables = places[:3]
        others = places.others_gate_up if gated else places.others_down
    num_pairs, device = groups.pair_P.shape[0], x.device
    num_outs = num_lines // 2 if gated else num_lines
    shared_bytes = shared_memory_bytes(device)
    tile = tile or grouped_tile(groups.pairs_each, gated, x.element_size(), shared_bytes)
    out_PO = torch.empty((num_pairs, num_outs), dtype=x.dtype, device=device)
    # a group of n pairs has at most (n + rows − 1) / rows tiles
    num_tiles = min(num_pairs, num_pairs // tile.rows + num_experts)
    constants: dict[str, Any] = {
        "NUM_EXPERTS": num_experts,
        "EXPERTS_P": triton.next_power_of_2(num_experts),
        "TOP_K": top_k,
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "ROWS": tile.rows,
        "LINES": tile.lines,
        "COLUMNS": tile.columns,
        "STAGES": tile.num_stages,
        "X_BY": x_by,
        "OUT_BY": out_by,
        "GATED": gated,
        "HAS_SCALE": scale_TK is not None,
        "OFFLOADED": places is not None,
        "HAS_BIAS": bias_EO is not None,
        "ALPHA": alpha,
        "LIMIT": limit,
        "UPCAST": device.type != "cuda",
    }
    grid = (triton.cdiv(num_outs, tile.lines // 2 if gated else tile.lines), num_tiles)
    grouped_gemm_kernel[grid](
        x,
        weight_EOD,
        others,
        *tables,
        groups.pair_P,
        groups.start_E1,
        x if scale_TK is None else scale_TK,
        bias_EO,
        out_PO,
        x.stride(0),
        **constants,
        num_warps=tile.num_warps,
        **launch_options(device),
    )
    return out_PO


def grouped_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None,
    local_X: Tensor | None = None,
    tiles: tuple[GroupedTile | None, GroupedTile | None] = (None, None),
    places: Places | None = None,
    clamp: Clamp = NO_CLAMP,
) -> Tensor:
    """`reference.experts.experts`; all tensors are contiguous but x, whose last stride is 1.

    The weighted output of each expert is rounded to x's dtype before the sum. `tiles` overrides the
    tiles of the two products, for measurements. With `places` the weights are those of slots. With
    `clamp` it is `reference.clamped.clamped_experts`.
    """
    gate_up_bias_EG, down_bias_ED, alpha, limit = clamp
    top_k = expert_TK.shape[1]
    num_experts = gate_up_EGD.shape[0] if places is None else places.num_experts
    groups = sort_pairs(expert_TK, num_experts, local_X)
    inner_PF = grouped_gemm(
        x_TD, gate_up_EGD, groups, top_k, x_by=BY_TOKEN.value, out_by=BY_PLACE.value, gated=True,
        tile=tiles[0], places=places, bias_EO=gate_up_bias_EG, alpha=alpha, limit=limit,
    )  # fmt: skip
    y_PD = grouped_gemm(
        inner_PF, down_EDF, groups, top_k, weight_TK, x_by=BY_PLACE.value, out_by=BY_PAIR.value,
        tile=tiles[1], places=places, bias_EO=down_bias_ED,
    )  # fmt: skip
    return combine(y_PD, expert_TK, residual_TD, local_X)
