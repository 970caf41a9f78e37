"""Products with one row, fused with their neighbours, in Triton.

As `skinny_gemm.py` describes. The row is multiplied in fp32 on the ordinary cores, one output per
warp, so warps do not synchronise.

Shapes: A outputs of a warp | W warps | C columns of a chunk | O outputs of one program
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels.triton.common import finish, prefetch_and_wait


@triton.jit
def _load_columns(
    at_AWC, chunk: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, POLICY: tl.constexpr
):
    """Chunk of rows that begin at `at_AWC`, which includes the columns' offsets."""
    if (chunk + 1) * COLUMNS <= DEPTH:
        return tl.load(at_AWC + chunk * COLUMNS, eviction_policy=POLICY)
    else:
        mask_C = chunk * COLUMNS + tl.arange(0, COLUMNS) < DEPTH
        return tl.load(
            at_AWC + chunk * COLUMNS, mask=mask_C[None, None, :], other=0.0, eviction_policy=POLICY
        )


@triton.jit
def _first_columns(
    w_at, up_at, norm_ptr, d_1WC, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr, HAS_NORM: tl.constexpr, SILU_MUL: tl.constexpr,
):  # fmt: skip
    """The first AHEAD chunks of the weights, of up's weights and of the norm's weight."""
    w, up, norm = (), (), ()
    for chunk in tl.static_range((DEPTH + COLUMNS - 1) // COLUMNS):
        if chunk < AHEAD:
            w += (_load_columns(w_at, chunk, DEPTH, COLUMNS, "evict_first"),)
            if SILU_MUL:
                up += (_load_columns(up_at, chunk, DEPTH, COLUMNS, "evict_first"),)
            if HAS_NORM:
                norm += (_load_columns(norm_ptr + d_1WC, chunk, DEPTH, COLUMNS, "evict_last"),)
    return w, up, norm


@triton.jit
def _gemv_sums(w, up, norm, x, w_at, up_at, norm_ptr, x_ptr, d_1WC, EACH: tl.constexpr,
               WARPS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
               AHEAD: tl.constexpr, HAS_NORM: tl.constexpr, SILU_MUL: tl.constexpr):  # fmt: skip
    """(x · weight, x · up, x²) of all chunks, per column of a chunk. The first are loaded."""
    NUM_CHUNKS: tl.constexpr = (DEPTH + COLUMNS - 1) // COLUMNS
    square_1WC = tl.zeros((1, WARPS, COLUMNS), tl.float32)
    acc_AWC = tl.zeros((EACH, WARPS, COLUMNS), tl.float32)
    acc_up_AWC = tl.zeros((EACH, WARPS, COLUMNS), tl.float32)
    for chunk in tl.static_range(NUM_CHUNKS):
        if chunk + AHEAD < NUM_CHUNKS:
            w += (_load_columns(w_at, chunk + AHEAD, DEPTH, COLUMNS, "evict_first"),)
            x += (_load_columns(x_ptr + d_1WC, chunk + AHEAD, DEPTH, COLUMNS, "evict_last"),)
            if SILU_MUL:
                up += (_load_columns(up_at, chunk + AHEAD, DEPTH, COLUMNS, "evict_first"),)
            if HAS_NORM:
                norm += (
                    _load_columns(norm_ptr + d_1WC, chunk + AHEAD, DEPTH, COLUMNS, "evict_last"),
                )
        x_1WC = x[chunk].to(tl.float32)
        if HAS_NORM:
            square_1WC += x_1WC * x_1WC
            x_1WC *= norm[chunk].to(tl.float32)
        acc_AWC += w[chunk].to(tl.float32) * x_1WC
        if SILU_MUL:
            acc_up_AWC += up[chunk].to(tl.float32) * x_1WC
    return acc_AWC, acc_up_AWC, square_1WC


@triton.jit
def gemv_begin(
    norm_ptr, weight_ptr, weight_stride,
    NUM_OUTS: tl.constexpr, DEPTH: tl.constexpr, OUTS: tl.constexpr, WARPS: tl.constexpr,
    COLUMNS: tl.constexpr, AHEAD: tl.constexpr, HAS_NORM: tl.constexpr, SILU_MUL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The outputs of a program [A, W], their rows, where their weights and up's are, and the first
    chunks of weights, of up's and of the norm's. `gemv_wait` follows."""
    EACH: tl.constexpr = OUTS // WARPS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o_AW = (
        tl.program_id(0) * OUTS + tl.arange(0, EACH)[:, None] * WARPS + tl.arange(0, WARPS)[None, :]
    )
    # outputs beyond the last recompute the last and are not stored
    row_AW = tl.minimum(o_AW, NUM_OUTS - 1)
    d_C = tl.arange(0, COLUMNS)
    d_1WC = d_C[None, None, :] + tl.zeros((1, WARPS, 1), tl.int32)
    w_at = weight_ptr + row_AW.to(tl.int64)[:, :, None] * weight_stride + d_C[None, None, :]
    up_at = w_at + NUM_OUTS * weight_stride.to(tl.int64)
    w, up, norm = _first_columns(
        w_at, up_at, norm_ptr, d_1WC, DEPTH, COLUMNS, AHEAD, HAS_NORM, SILU_MUL
    )
    return o_AW, row_AW, w_at, up_at, d_1WC, w, up, norm


@triton.jit
def gemv_wait(
    weight_ptr, weight_stride, NUM_OUTS: tl.constexpr, DEPTH: tl.constexpr, OUTS: tl.constexpr,
    COLUMNS: tl.constexpr, AHEAD: tl.constexpr, PREFETCH_P: tl.constexpr, SILU_MUL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Prefetches weights, and waits for the results of earlier kernels."""
    row_O = tl.minimum(tl.program_id(0) * OUTS + tl.arange(0, OUTS), NUM_OUTS - 1)
    prefetch_and_wait(
        weight_ptr + row_O.to(tl.int64) * weight_stride, NUM_OUTS * weight_stride.to(tl.int64),
        AHEAD * COLUMNS, DEPTH, PREFETCH_P, SILU_MUL, PDL,
    )  # fmt: skip


@triton.jit
def gemv_products(
    x_ptr, norm_ptr, bias_ptr, row_AW, w_at, up_at, d_1WC, w, up, norm, eps,
    NUM_OUTS: tl.constexpr, DEPTH: tl.constexpr, OUTS: tl.constexpr, WARPS: tl.constexpr,
    COLUMNS: tl.constexpr, AHEAD: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    SILU_MUL: tl.constexpr,
):  # fmt: skip
    """(x · weight, x · up) with their biases, in fp32. The arguments are of `gemv_begin`."""
    NUM_CHUNKS: tl.constexpr = (DEPTH + COLUMNS - 1) // COLUMNS
    x = ()
    for chunk in tl.static_range(NUM_CHUNKS):
        if chunk < AHEAD:
            x += (_load_columns(x_ptr + d_1WC, chunk, DEPTH, COLUMNS, "evict_last"),)
    acc_AWC, acc_up_AWC, square_1WC = _gemv_sums(
        w, up, norm, x, w_at, up_at, norm_ptr, x_ptr, d_1WC, OUTS // WARPS, WARPS, DEPTH, COLUMNS,
        AHEAD, HAS_NORM, SILU_MUL,
    )  # fmt: skip
    y_AW = tl.sum(acc_AWC, 2)
    up_AW = y_AW
    if SILU_MUL:
        up_AW = tl.sum(acc_up_AWC, 2)
    if HAS_NORM:
        factor_1W = tl.rsqrt(tl.sum(square_1WC, 2) / DEPTH + eps)
        y_AW *= factor_1W
        up_AW *= factor_1W
    if HAS_BIAS:
        y_AW += tl.load(bias_ptr + row_AW).to(tl.float32)
        if SILU_MUL:
            up_AW += tl.load(bias_ptr + NUM_OUTS + row_AW).to(tl.float32)
    return y_AW, up_AW


@triton.jit
def gemv_kernel(
    x_ptr,  # [D]
    norm_ptr,  # [D], read if HAS_NORM
    weight_ptr,  # [outputs, D]
    bias_ptr,  # [outputs], read if HAS_BIAS
    residual_ptr,  # [NUM_OUTS], read if HAS_RESIDUAL
    out_ptr,  # [NUM_OUTS], written
    weight_stride,
    eps,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTS: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH_P: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU_MUL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles are [A, W, C]: A outputs for each of W warps, COLUMNS as wide as one load of a warp.

    Every warp has a copy of x, [1, W, C], so nothing crosses warps. The norm's factor is applied
    last: it is the same for all products.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    o_AW, row_AW, w_at, up_at, d_1WC, w, up, norm = gemv_begin(
        norm_ptr, weight_ptr, weight_stride, NUM_OUTS, DEPTH, OUTS, WARPS, COLUMNS, AHEAD,
        HAS_NORM, SILU_MUL, PDL,
    )  # fmt: skip
    gemv_wait(
        weight_ptr, weight_stride, NUM_OUTS, DEPTH, OUTS, COLUMNS, AHEAD, PREFETCH_P, SILU_MUL, PDL
    )
    if HAS_RESIDUAL:  # loaded early, so that the end of the program does not wait for it
        residual_AW = tl.load(residual_ptr + row_AW)
    y_AW, up_AW = gemv_products(
        x_ptr, norm_ptr, bias_ptr, row_AW, w_at, up_at, d_1WC, w, up, norm, eps, NUM_OUTS, DEPTH,
        OUTS, WARPS, COLUMNS, AHEAD, HAS_NORM, HAS_BIAS, SILU_MUL,
    )  # fmt: skip
    y_AW = finish(y_AW, up_AW, dtype, SILU_MUL)
    if HAS_RESIDUAL:
        y_AW = (y_AW.to(tl.float32) + residual_AW.to(tl.float32)).to(dtype)
    tl.store(out_ptr + o_AW, y_AW, mask=o_AW < NUM_OUTS)
