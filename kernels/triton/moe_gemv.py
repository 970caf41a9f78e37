"""Experts of a few tokens in Triton: every (token, expert) pair by itself, on the ordinary cores.

With few tokens hardly two of them share an expert, and the products stream weights. gate and up of
a pair are one launch with SiLU at its end. The products with down are a second launch, in which a
program adds the weighted outputs of all of a token's experts, and the residual. One output per
warp, so warps do not synchronise. For a pair whose expert is elsewhere no weights are read.

Shapes: T tokens | K experts per token | P = T·K pairs | E experts | X experts, with those elsewhere
| D hidden | F expert width | W warps | A outputs of a warp | C columns of a chunk
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import (
    NO_CLAMP,
    Clamp,
    Places,
    expert_at,
    finish,
    launch_options,
    local_expert,
)

# Loops of up to so many steps, with a fixed number of them, are unrolled by the compiler.
UNROLLED = tl.constexpr(8)
COLUMNS = 256  # as wide as one load of a warp: 32 threads, 8 elements of 16 bits


class GemvTile(NamedTuple):
    """The sizes of a launch: outputs of one program, warps, chunks that are loaded together."""

    outs: int
    num_warps: int
    ahead: int


@triton.jit
def _chunk(at, first, end, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
           MASKED: tl.constexpr, POLICY: tl.constexpr):  # fmt: skip
    """Columns from `first` on of rows that begin at `at`, which includes the columns' offsets.

    If MASKED nothing is read where `end` is 0.
    """
    if EXACT and not MASKED:
        return tl.load(at + first, eviction_policy=POLICY)
    elif EXACT:
        return tl.load(at + first, mask=end > 0, other=0.0, eviction_policy=POLICY)
    else:
        mask_C = first + tl.arange(0, COLUMNS) < DEPTH
        if MASKED:
            mask_C = mask_C & (end > 0)
        return tl.load(at + first, mask=mask_C[None, None, :], other=0.0, eviction_policy=POLICY)


@triton.jit
def _dots(acc_AWC, up_AWC, w_at, up_at, x_at, scale, first, end, DEPTH: tl.constexpr,
          COLUMNS: tl.constexpr, AHEAD: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
          GATED: tl.constexpr):  # fmt: skip
    """Add AHEAD chunks of x · wᵀ · scale (and x · upᵀ). All loads come first."""
    w, up, x = (), (), ()
    for j in tl.static_range(AHEAD):
        at = first + j * COLUMNS
        w += (_chunk(w_at, at, end, DEPTH, COLUMNS, EXACT, MASKED, "evict_first"),)
        if GATED:
            up += (_chunk(up_at, at, end, DEPTH, COLUMNS, EXACT, MASKED, "evict_first"),)
    for j in tl.static_range(AHEAD):
        at = first + j * COLUMNS
        x += (_chunk(x_at, at, end, DEPTH, COLUMNS, EXACT, MASKED, "evict_last"),)
    for j in tl.static_range(AHEAD):
        x_1WC = x[j].to(tl.float32)
        if not GATED:
            x_1WC *= scale
        acc_AWC += w[j].to(tl.float32) * x_1WC
        if GATED:
            up_AWC += up[j].to(tl.float32) * x_1WC
    return acc_AWC, up_AWC


@triton.jit
def moe_gemv_gate_up_kernel(
    x_ptr,  # [T, D]
    expert_ptr,  # [P]
    local_ptr,  # [X], read if EXPERT_PARALLEL
    weight_ptr,  # [E, 2 · NUM_OUTS, D], gate's rows first
    others_ptr,  # the next three are read if OFFLOADED: see `common.Places`
    first_ptr,
    slot_ptr,
    bias_ptr,  # [E, 2 · NUM_OUTS], None unless HAS_BIAS
    out_ptr,  # [P, NUM_OUTS], written
    x_stride,
    TOP_K: tl.constexpr,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTS: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    OFFLOADED: tl.constexpr,
    EXPERT_PARALLEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    EACH: tl.constexpr = OUTS // WARPS
    BLOCK: tl.constexpr = AHEAD * COLUMNS
    EXACT: tl.constexpr = DEPTH % BLOCK == 0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(1)
    o_AW = (
        tl.program_id(0) * OUTS + tl.arange(0, EACH)[:, None] * WARPS + tl.arange(0, WARPS)[None, :]
    )
    # outputs beyond the last recompute the last and are not stored
    row_AW = tl.minimum(o_AW, NUM_OUTS - 1)
    d_11C = tl.arange(0, COLUMNS)[None, None, :]
    d_1WC = d_11C + tl.zeros((1, WARPS, 1), tl.int32)
    at_AWC = (row_AW * DEPTH)[:, :, None] + d_11C
    if PDL:
        tl.extra.cuda.gdc_wait()
    expert = local_expert(local_ptr, tl.load(expert_ptr + pair), EXPERT_PARALLEL)
    if EXPERT_PARALLEL:  # noqa: SIM102  (Triton has no `and` of a constant and a value)
        if expert < 0:
            return
    w_at = at_AWC + expert_at(
        weight_ptr, others_ptr, first_ptr, slot_ptr, expert, 2 * NUM_OUTS * DEPTH, OFFLOADED
    )
    up_at = w_at + NUM_OUTS * DEPTH
    x_at = x_ptr + (pair // TOP_K) * x_stride + d_1WC
    acc_AWC = tl.zeros((EACH, WARPS, COLUMNS), tl.float32)
    up_AWC = tl.zeros((EACH, WARPS, COLUMNS), tl.float32)
    if DEPTH <= BLOCK:
        acc_AWC, up_AWC = _dots(
            acc_AWC, up_AWC, w_at, up_at, x_at, 1.0, 0, DEPTH, DEPTH, COLUMNS, AHEAD, EXACT, False,
            True,
        )  # fmt: skip
    else:
        for first in tl.range(0, DEPTH, BLOCK):
            acc_AWC, up_AWC = _dots(
                acc_AWC, up_AWC, w_at, up_at, x_at, 1.0, first, DEPTH, DEPTH, COLUMNS, AHEAD, EXACT,
                False, True,
            )  # fmt: skip
    gate_AW, up_AW = tl.sum(acc_AWC, 2), tl.sum(up_AWC, 2)
    if HAS_BIAS:
        bias_at = bias_ptr + expert * (2 * NUM_OUTS) + row_AW
        gate_AW += tl.load(bias_at).to(tl.float32)
        up_AW += tl.load(bias_at + NUM_OUTS).to(tl.float32)
    y_AW = finish(gate_AW, up_AW, dtype, True, ALPHA, LIMIT)
    tl.store(out_ptr + pair * NUM_OUTS + o_AW, y_AW, mask=o_AW < NUM_OUTS)


@triton.jit
def _add_bias(bias_AW, bias_ptr, at_AW, is_here_AW, scale, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        one_AW = tl.load(bias_ptr + at_AW, mask=is_here_AW, other=0.0)
        bias_AW += scale * one_AW.to(tl.float32)
    return bias_AW


@triton.jit
def _sums(acc_AWC, bias_AW, HAS_BIAS: tl.constexpr):
    y_AW = tl.sum(acc_AWC, 2)
    if HAS_BIAS:
        y_AW += bias_AW
    return y_AW


@triton.jit
def moe_gemv_down_kernel(
    x_ptr,  # [P, DEPTH]
    scale_ptr,  # [P] fp32
    expert_ptr,  # [P]
    local_ptr,  # [X], read if EXPERT_PARALLEL
    weight_ptr,  # [E, NUM_OUTS, DEPTH]
    others_ptr,  # the next three are read if OFFLOADED: see `common.Places`
    first_ptr,
    slot_ptr,
    residual_ptr,  # [T, NUM_OUTS], read if HAS_RESIDUAL
    bias_ptr,  # [E, NUM_OUTS], None unless HAS_BIAS
    out_ptr,  # [T, NUM_OUTS], written
    TOP_K: tl.constexpr,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTS: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OFFLOADED: tl.constexpr,
    EXPERT_PARALLEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    EACH: tl.constexpr = OUTS // WARPS
    BLOCK: tl.constexpr = AHEAD * COLUMNS
    EXACT: tl.constexpr = DEPTH % BLOCK == 0
    # Short loops are unrolled, and the loads of all pairs come first. A branch would stop that.
    MASKED: tl.constexpr = EXPERT_PARALLEL and DEPTH <= UNROLLED * BLOCK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(1)
    o_AW = (
        tl.program_id(0) * OUTS + tl.arange(0, EACH)[:, None] * WARPS + tl.arange(0, WARPS)[None, :]
    )
    row_AW = tl.minimum(o_AW, NUM_OUTS - 1)
    d_11C = tl.arange(0, COLUMNS)[None, None, :]
    d_1WC = d_11C + tl.zeros((1, WARPS, 1), tl.int32)
    at_AWC = (row_AW * DEPTH)[:, :, None] + d_11C
    if PDL:
        tl.extra.cuda.gdc_wait()
    if HAS_RESIDUAL:  # loaded early, so that the end of the program does not wait for it
        residual_AW = tl.load(residual_ptr + token * NUM_OUTS + row_AW)
    acc_AWC = tl.zeros((EACH, WARPS, COLUMNS), tl.float32)
    bias_AW = tl.zeros((EACH, WARPS), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = local_expert(local_ptr, tl.load(expert_ptr + pair), EXPERT_PARALLEL)
        scale, end = tl.load(scale_ptr + pair), DEPTH
        if EXPERT_PARALLEL:
            scale, end = tl.where(expert < 0, 0.0, scale), tl.where(expert < 0, 0, DEPTH)
            expert = tl.maximum(expert, 0)
        w_at = at_AWC + expert_at(
            weight_ptr, others_ptr, first_ptr, slot_ptr, expert, NUM_OUTS * DEPTH, OFFLOADED
        )
        bias_AW = _add_bias(
            bias_AW,
            bias_ptr,
            expert * NUM_OUTS + row_AW,
            (row_AW >= 0) & (end > 0),
            scale,
            HAS_BIAS,
        )
        x_at = x_ptr + pair * DEPTH + d_1WC
        if DEPTH <= BLOCK:
            acc_AWC, _ = _dots(
                acc_AWC, acc_AWC, w_at, w_at, x_at, scale, 0, end, DEPTH, COLUMNS, AHEAD, EXACT,
                MASKED, False,
            )  # fmt: skip
        else:
            for first in tl.range(0, DEPTH if MASKED else end, BLOCK):
                acc_AWC, _ = _dots(
                    acc_AWC, acc_AWC, w_at, w_at, x_at, scale, first, end, DEPTH, COLUMNS, AHEAD,
                    EXACT, MASKED, False,
                )  # fmt: skip
    y_AW = _sums(acc_AWC, bias_AW, HAS_BIAS).to(dtype)
    if HAS_RESIDUAL:
        y_AW = (y_AW.to(tl.float32) + residual_AW.to(tl.float32)).to(dtype)
    tl.store(out_ptr + token * NUM_OUTS + o_AW, y_AW, mask=o_AW < NUM_OUTS)


def chunks_ahead(depth: int, most: int) -> int:
    """The most chunks that may be loaded together and divide the row."""
    chunks = triton.cdiv(depth, COLUMNS)
    return next(ahead for ahead in range(min(chunks, most), 0, -1) if chunks % ahead == 0)


def gemv_tiles(hidden: int, size: int) -> tuple[GemvTile, GemvTile]:
    """Tiles of the products with gate and up, and with down; measured on an H200 (docs/log.md)."""
    return GemvTile(8, 8, chunks_ahead(hidden, 4)), GemvTile(16, 16, chunks_ahead(size, 1))


def moe_gemv(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None,
    local_X: Tensor | None = None,
    tiles: tuple[GemvTile, GemvTile] | None = None,
    places: Places | None = None,
    clamp: Clamp = NO_CLAMP,
) -> Tensor:
    """`reference.experts.experts`; all tensors are contiguous but x, whose last stride is 1.

    `tiles` overrides the tiles of the two launches, for measurements. With `places` the weights are
    those of slots. With `clamp` it is `reference.clamped.clamped_experts`.
    """
    (num_tokens, top_k), device, dtype = expert_TK.shape, x_TD.device, x_TD.dtype
    (_, depth, size), options = down_EDF.shape, launch_options(x_TD.device)
    first, second = tiles or gemv_tiles(depth, size)
    local = expert_TK if local_X is None else local_X
    tables = (expert_TK, expert_TK) if places is None else (places.first_1, places.slot_I)
    inner_PF = torch.empty((num_tokens * top_k, size), dtype=dtype, device=device)
    out_TD = torch.empty((num_tokens, depth), dtype=dtype, device=device)
    moe_gemv_gate_up_kernel[(triton.cdiv(size, first.outs), num_tokens * top_k)](
        x_TD,
        expert_TK,
        local,
        gate_up_EGD,
        gate_up_EGD if places is None else places.others_gate_up,
        *tables,
        clamp.gate_up_bias_EG,
        inner_PF,
        x_TD.stride(0),
        TOP_K=top_k,
        NUM_OUTS=size,
        DEPTH=depth,
        OUTS=first.outs,
        WARPS=first.num_warps,
        COLUMNS=COLUMNS,
        AHEAD=first.ahead,
        OFFLOADED=places is not None,
        EXPERT_PARALLEL=local_X is not None,
        HAS_BIAS=clamp.gate_up_bias_EG is not None,
        ALPHA=clamp.alpha,
        LIMIT=clamp.limit,
        num_warps=first.num_warps,
        **options,
    )
    moe_gemv_down_kernel[(triton.cdiv(depth, second.outs), num_tokens)](
        inner_PF,
        weight_TK,
        expert_TK,
        local,
        down_EDF,
        down_EDF if places is None else places.others_down,
        *tables,
        x_TD if residual_TD is None else residual_TD,
        clamp.down_bias_ED,
        out_TD,
        TOP_K=top_k,
        NUM_OUTS=depth,
        DEPTH=size,
        OUTS=second.outs,
        WARPS=second.num_warps,
        COLUMNS=COLUMNS,
        AHEAD=second.ahead,
        HAS_RESIDUAL=residual_TD is not None,
        OFFLOADED=places is not None,
        EXPERT_PARALLEL=local_X is not None,
        HAS_BIAS=clamp.down_bias_ED is not None,
        num_warps=second.num_warps,
        **options,
    )
    return out_TD
