"""Products of one row with packed weights, fused with their neighbours, in Triton.

(RMS norm →) x · weightᵀ + bias (→ SiLU·up) (+ residual); also for each pair of a token and one of
its experts. As in `gemv.py` the row is multiplied in fp32 on the ordinary cores, and the first
codes are loaded before the wait for earlier kernels.

A thread has pieces of 8 bytes of codes of each output: 16 or 8 columns. So x is converted, normed
and scaled once for all outputs of a program, and stays in registers. Scales multiply the sum of a
piece's columns, and offsets the sum of x. A piece of 16 bytes would need x in another order of
threads than that of its loads, which are 16 bytes wide: 60 barriers in a program.

Shapes: A weight rows of a program | B pieces of a chunk | 2 words of a piece
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import finish, launch_options, local_expert, num_multiprocessors
from nanovllm.kernels.triton.packed_codes import Codes, scaled_level, unit, x_factor
from nanovllm.kernels.triton.packed_tiles import PackedGemvTile, gemv_tile


@triton.jit
def _float(words, T: tl.constexpr, dtype: tl.constexpr):
    """The number T of the four in words of 64 bits, in fp32."""
    return (words >> (16 * T)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _four(at_B2, piece_B2, DEPTH: tl.constexpr, EXACT: tl.constexpr, COLUMNS: tl.constexpr):
    """Words of 64 bits with four numbers each; zeros behind the depth."""
    if EXACT:
        return tl.load(at_B2, eviction_policy="evict_last")
    else:
        mask = piece_B2 * COLUMNS < DEPTH
        return tl.load(at_B2, mask=mask, other=0, eviction_policy="evict_last")


@triton.jit
def _inputs(x_at, norm_at, piece_B2, factor, dtype: tl.constexpr, DEPTH: tl.constexpr,
            EXACT: tl.constexpr, BITS: tl.constexpr, HAS_NORM: tl.constexpr):  # fmt: skip
    """(x of the codes of a word: a tuple of [1, B, 2]; the sum of x² [1, B, 2])."""
    COLUMNS: tl.constexpr = 64 // BITS
    x, square = (), tl.zeros(x_at.shape, tl.float32)
    low = _four(x_at, piece_B2, DEPTH, EXACT, COLUMNS)
    high = low
    if BITS == 4:
        high = _four(x_at + 4, piece_B2, DEPTH, EXACT, COLUMNS)
    if HAS_NORM:
        norm_low = _four(norm_at, piece_B2, DEPTH, EXACT, COLUMNS)
        norm_high = norm_low
        if BITS == 4:
            norm_high = _four(norm_at + 4, piece_B2, DEPTH, EXACT, COLUMNS)
    for t in tl.static_range(4):
        for h in tl.static_range(8 // BITS):
            one = _float(low if h == 0 else high, t, dtype) * factor
            if HAS_NORM:
                square += one * one
                one *= _float(norm_low if h == 0 else norm_high, t, dtype)
            x += (one,)
    return x, square


@triton.jit
def _codes(code_at, piece_1B1, keep, EXACT: tl.constexpr, MASKED: tl.constexpr,
           NUM_PIECES: tl.constexpr):  # fmt: skip
    if EXACT and not MASKED:
        return tl.load(code_at, eviction_policy="evict_first")
    else:
        mask = (piece_1B1 < NUM_PIECES) & keep
        return tl.load(code_at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _scales(at, piece_1B, keep, EXACT: tl.constexpr, MASKED: tl.constexpr,
            NUM_PIECES: tl.constexpr):  # fmt: skip
    if EXACT and not MASKED:
        return tl.load(at)
    else:
        return tl.load(at, mask=(piece_1B < NUM_PIECES) & keep, other=0.0)


@triton.jit
def _partial(code_AB2, x, table_ptr, FIRST: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr,
             FORM: tl.constexpr):  # fmt: skip
    """([A, B], [1, B]): the sums of x · level · factors, and of x · factors, over a piece's codes
    FIRST, FIRST + STEP, …"""
    sum_AB2 = tl.zeros(code_AB2.shape, tl.float32)
    x_1B2 = tl.zeros(x[0].shape, tl.float32)
    for k in tl.static_range(FIRST, 32 // BITS, STEP):
        sum_AB2 += scaled_level(code_AB2, k, BITS, FORM, table_ptr) * (
            x[k] * x_factor(k, BITS, FORM)
        )
        x_1B2 += x[k]
    return tl.sum(sum_AB2, 2), tl.sum(x_1B2, 2) * (1.0 / unit(FORM))


@triton.jit
def packed_gemv_kernel(  # noqa: C901
    x_ptr,  # words of four numbers
    norm_ptr,  # [D / 4] such words, read if HAS_NORM
    code_ptr,  # [.., O, words of 4 bytes]
    scale_ptr,  # [.., R, G]
    offset_ptr,  # [.., R, G], read if HAS_OFFSET
    table_ptr,
    expert_ptr,  # [P], read if HAS_EXPERTS
    local_ptr,  # [X], read if EXPERT_PARALLEL
    factor_ptr,  # [P] fp32, read if HAS_FACTOR: multiplies the products of pairs
    bias_ptr,  # [.., O], read if HAS_BIAS
    residual_ptr,  # [T, NUM_OUTS], read if HAS_RESIDUAL
    out_ptr,  # [rows, NUM_OUTS], written
    x_stride,  # in words
    eps,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    OUTS: tl.constexpr,
    PIECES: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    X_SHARED_BY: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU_MUL: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    EXPERT_PARALLEL: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes OUTS outputs of the row `program_id(1)`: the sum of PAIRS products.

    X_SHARED_BY products share a row of x.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    ROWS: tl.constexpr = OUTS * 2 if SILU_MUL else OUTS
    COLUMNS: tl.constexpr = 64 // BITS  # of a piece
    NUM_PIECES: tl.constexpr = DEPTH // COLUMNS
    CHUNKS: tl.constexpr = (NUM_PIECES + PIECES - 1) // PIECES
    STEPS: tl.constexpr = PAIRS * CHUNKS
    EXACT: tl.constexpr = NUM_PIECES % PIECES == 0
    LINES: tl.constexpr = NUM_OUTS * 2 if SILU_MUL else NUM_OUTS
    HALVES: tl.constexpr = GROUP == 16 and BITS == 4  # low and high codes have their own scales
    MASKED: tl.constexpr = EXPERT_PARALLEL
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1)
    i_A = tl.arange(0, ROWS)
    # outputs beyond the last recompute the last and are not stored
    line_A = tl.minimum(tl.program_id(0) * OUTS + i_A % OUTS, NUM_OUTS - 1) + i_A // OUTS * NUM_OUTS
    b_1B = tl.arange(0, PIECES)[None, :]
    b_1B1, w_112 = b_1B[:, :, None], tl.arange(0, 2)[None, None, :]
    b_1B2 = b_1B1 + tl.zeros((1, 1, 2), tl.int32)
    at_AB2 = line_A.to(tl.int64)[:, None, None] * (NUM_PIECES * 2) + (b_1B1 * 2 + w_112)
    group_A = (line_A // GROUP_ROWS)[:, None] * NUM_GROUPS
    x_at_1B2 = b_1B1 * 2 + w_112
    if BITS == 4:  # columns 0 … 7 and 16 … 23 of a block of 32, or the others
        x_at_1B2 = b_1B1 // 2 * 8 + b_1B1 % 2 * 2 + w_112
    WORDS: tl.constexpr = LINES * NUM_PIECES * 2
    SCALES: tl.constexpr = ((LINES + GROUP_ROWS - 1) // GROUP_ROWS) * NUM_GROUPS

    if PDL and HAS_EXPERTS:
        tl.extra.cuda.gdc_wait()
    expert, codes, scales, offsets = (), (), (), ()
    for i in tl.static_range(PAIRS):
        one = 0
        if HAS_EXPERTS:
            one = tl.load(expert_ptr + row * PAIRS + i)
            one = local_expert(local_ptr, one, EXPERT_PARALLEL)
        expert += (one,)
    for step in tl.static_range(AHEAD if AHEAD < STEPS else STEPS):
        one, scale, offset = _step(
            code_ptr, scale_ptr, offset_ptr, expert[step // CHUNKS], at_AB2, group_A, b_1B,
            step % CHUNKS * PIECES, WORDS, SCALES, EXACT, MASKED, NUM_PIECES, COLUMNS, GROUP,
            HALVES, HAS_OFFSET, HAS_EXPERTS,
        )  # fmt: skip
        codes += (one,)
        scales += (scale,)
        offsets += (offset,)
    if PDL and not HAS_EXPERTS:
        tl.extra.cuda.gdc_wait()
    if HAS_RESIDUAL:  # loaded early, so that the end of the program does not wait for it
        o_O = tl.minimum(tl.program_id(0) * OUTS + tl.arange(0, OUTS), NUM_OUTS - 1)
        residual_O = tl.load(residual_ptr + row * NUM_OUTS + o_O)
    acc_AB = tl.zeros((ROWS, PIECES), tl.float32)
    square_1B2 = tl.zeros((1, PIECES, 2), tl.float32)
    for step in tl.static_range(STEPS):
        if step + AHEAD < STEPS:
            one, scale, offset = _step(
                code_ptr, scale_ptr, offset_ptr, expert[(step + AHEAD) // CHUNKS], at_AB2, group_A,
                b_1B, (step + AHEAD) % CHUNKS * PIECES, WORDS, SCALES, EXACT, MASKED, NUM_PIECES,
                COLUMNS, GROUP, HALVES, HAS_OFFSET, HAS_EXPERTS,
            )  # fmt: skip
            codes += (one,)
        scales += (scale,)
        offsets += (offset,)
        first = step % CHUNKS * PIECES
        pair = row * PAIRS + step // CHUNKS
        factor, end = 1.0, first
        if HAS_FACTOR:
            factor = tl.load(factor_ptr + pair)
        if EXPERT_PARALLEL:  # nothing is read behind the last block
            is_here = expert[step // CHUNKS] >= 0
            factor, end = tl.where(is_here, factor, 0.0), tl.where(is_here, first, NUM_PIECES)
        x_at = x_ptr + (pair // X_SHARED_BY) * x_stride + first * (COLUMNS // 4) + x_at_1B2
        x, square = _inputs(
            x_at, norm_ptr + first * (COLUMNS // 4) + x_at_1B2, b_1B2 + end, factor, dtype, DEPTH,
            EXACT and not MASKED, BITS, HAS_NORM,
        )  # fmt: skip
        square_1B2 += square
        if HALVES:
            low_AB, x_1B = _partial(codes[step], x, table_ptr, 0, 2, BITS, FORM)
            high_AB, high_1B = _partial(codes[step], x, table_ptr, 1, 2, BITS, FORM)
            acc_AB += low_AB * scales[step][0] + high_AB * scales[step][1]
            if HAS_OFFSET:
                acc_AB += x_1B * offsets[step][0] + high_1B * offsets[step][1]
        else:
            sum_AB, x_1B = _partial(codes[step], x, table_ptr, 0, 1, BITS, FORM)
            acc_AB += sum_AB * scales[step][0]
            if HAS_OFFSET:
                acc_AB += x_1B * offsets[step][0]
    y_A = tl.sum(acc_AB, 1) * unit(FORM)
    if HAS_NORM:
        y_A *= tl.rsqrt(tl.sum(tl.sum(tl.sum(square_1B2, 2), 1), 0) / DEPTH + eps)
    if HAS_BIAS and not HAS_EXPERTS:
        y_A += tl.load(bias_ptr + line_A).to(tl.float32)
    elif HAS_BIAS:
        for i in tl.static_range(PAIRS):
            factor = 1.0
            if HAS_FACTOR:
                factor = tl.load(factor_ptr + row * PAIRS + i)
            is_here_A = (line_A >= 0) & (expert[i] >= 0)
            bias_at = bias_ptr + tl.maximum(expert[i], 0) * LINES + line_A
            one_A = tl.load(bias_at, mask=is_here_A, other=0.0).to(tl.float32)
            y_A += tl.where(is_here_A, factor * one_A, 0.0)
    if SILU_MUL:
        gate_O, up_O = tl.split(tl.trans(tl.reshape(y_A, (2, OUTS))))
        y_O = finish(gate_O, up_O, dtype, True, ALPHA, LIMIT)
    else:
        y_O = y_A.to(dtype)
    if HAS_RESIDUAL:
        y_O = (y_O.to(tl.float32) + residual_O.to(tl.float32)).to(dtype)
    out_O = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    tl.store(out_ptr + row * NUM_OUTS + out_O, y_O, mask=out_O < NUM_OUTS)


@triton.jit
def _step(code_ptr, scale_ptr, offset_ptr, expert, at_AB2, group_A, b_1B, first: tl.constexpr,
          WORDS: tl.constexpr, SCALES: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
          NUM_PIECES: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
          HALVES: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_EXPERTS: tl.constexpr):  # fmt: skip
    """The codes of a step [A, B, 2], its scales and its offsets: tuples of one or two [A, B]."""
    keep = expert >= 0
    if HAS_EXPERTS:
        place = tl.maximum(expert, 0).to(tl.int64)
        code_ptr += place * WORDS
        scale_ptr += place * SCALES
        offset_ptr += place * SCALES
    piece_1B = first + b_1B
    words_AB2 = _codes(
        code_ptr + at_AB2 + first * 2, piece_1B[:, :, None], keep, EXACT, MASKED, NUM_PIECES
    ).to(tl.uint32, bitcast=True)
    scale, offset = (), ()
    for h in tl.static_range(2 if HALVES else 1):
        column_1B = piece_1B * COLUMNS
        if COLUMNS == 16:
            column_1B = piece_1B // 2 * 32 + 16 * h
        at_AB = group_A + column_1B // GROUP
        one_AB = _scales(scale_ptr + at_AB, piece_1B, keep, EXACT, MASKED, NUM_PIECES)
        scale += (one_AB.to(tl.float32),)
        if HAS_OFFSET:
            one_AB = _scales(offset_ptr + at_AB, piece_1B, keep, EXACT, MASKED, NUM_PIECES)
            offset += (one_AB.to(tl.float32),)
    return words_AB2, scale, offset


def gemv_constants(
    num_outs: int, depth: int, codes: Codes, silu_mul: bool, tile: PackedGemvTile, pairs: int = 1
) -> dict[str, Any]:
    """The kernel's constants that depend on the weight and the tile."""
    return codes.constants() | {
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "OUTS": tile.outs,
        "PIECES": 32 * tile.num_warps * tile.each,
        "AHEAD": tile.ahead,
        "PAIRS": pairs,
        "SILU_MUL": silu_mul,
    }


def packed_gemv(
    x_TD: Tensor,
    codes: Codes,
    *,
    norm_D: Tensor | None = None,
    eps: float = 0.0,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    silu_mul: bool = False,
    expert_TK: Tensor | None = None,
    local_X: Tensor | None = None,
    factor_TK: Tensor | None = None,
    x_shared_by: int = 1,
    adds_pairs: bool = False,
    launch: PackedGemvTile | None = None,
    pdl: bool | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> Tensor:
    """x · weightᵀ of each row by itself, with its neighbours; see `reference.packed`.

    With `expert_TK` the weights are those of experts, and the result has a row for each pair, or,
    if `adds_pairs`, the sum of each token's pairs times `factor_TK`. `x_shared_by` pairs share a
    row of x. `bias_O` is [E, O] then, and multiplied as the products are. With a `limit` the
    activation is `reference.norm_act.clamped_swiglu`. `launch` and `pdl` override the tile and
    programmatic dependent launch.
    """
    num_x, depth = x_TD.shape
    num_lines, device, dtype = codes.num_rows, x_TD.device, x_TD.dtype
    num_outs = num_lines // 2 if silu_mul else num_lines
    num_out_rows = num_x if expert_TK is None else expert_TK.numel()
    pairs = 1
    if adds_pairs and expert_TK is not None:
        num_out_rows, pairs = expert_TK.shape
    tile = launch or gemv_tile(
        num_out_rows, codes, depth, silu_mul, pairs, num_multiprocessors(device)
    )
    out_TO = torch.empty((num_out_rows, num_outs), dtype=dtype, device=device)
    if x_TD.stride(0) % 8 or x_TD.storage_offset() % 8 or x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous().clone()  # words of 64 bits are read, 16 bytes at a time
    if norm_D is not None and norm_D.storage_offset() % 8:
        norm_D = norm_D.clone()
    words = x_TD.view(torch.int64)
    packed_gemv_kernel[(triton.cdiv(num_outs, tile.outs), num_out_rows)](
        words,
        words if norm_D is None else norm_D.view(torch.int64),
        codes.code.view(torch.int32),
        *codes.tensors(),
        words if expert_TK is None else expert_TK,
        words if local_X is None else local_X,
        words if factor_TK is None else factor_TK,
        words if bias_O is None else bias_O,
        words if residual_TO is None else residual_TO,
        out_TO,
        words.stride(0),
        eps,
        **gemv_constants(num_outs, depth, codes, silu_mul, tile, pairs),
        X_SHARED_BY=x_shared_by,
        HAS_NORM=norm_D is not None,
        HAS_BIAS=bias_O is not None,
        HAS_RESIDUAL=residual_TO is not None,
        HAS_EXPERTS=expert_TK is not None,
        EXPERT_PARALLEL=local_X is not None,
        HAS_FACTOR=factor_TK is not None,
        ALPHA=alpha,
        LIMIT=limit,
        num_warps=tile.num_warps,
        **(launch_options(device) if pdl is not False else {"PDL": False}),
    )
    return out_TO
