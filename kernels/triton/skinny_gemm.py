"""Products with few rows, fused with their neighbours, in Triton.

(RMS norm →) x · weightᵀ + bias (→ SiLU·up) (+ residual). With few rows a product streams weights,
and a decode step is a chain of such streams in which every kernel waits for the one before. Weights
do not depend on earlier kernels. So a program loads its first chunks of weights, then waits for its
predecessor (programmatic dependent launch, sm_90), then reads the rows, which are small and in the
L2, norms them (each program by itself) and multiplies. It lets its successor start before all this,
so that the successor's weights load as well. A program computes OUTS outputs over the whole depth:
there are no partial results, and every run gives the same bits.

`gemv.py` multiplies one row on the ordinary cores. Two and more rows use the tensor cores, with a
slice of the depth per warp. docs/log.md has the measurements.

Shapes: T rows (tokens), "p" after it: padded to a power of two | D depth (inner size) | O outputs
of one program | C columns of a chunk | S slices of a chunk
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import finish, launch_options, prefetch_and_wait
from nanovllm.kernels.triton.gemv import gemv_kernel
from nanovllm.kernels.triton.skinny_tiles import SkinnyTile, skinny_tile


@triton.jit
def _load_slices(at_SRC, chunk: tl.constexpr, keep_R, DEPTH: tl.constexpr, SLICES: tl.constexpr,
                 COLUMNS: tl.constexpr, MASK_ROWS: tl.constexpr, POLICY: tl.constexpr):  # fmt: skip
    """Chunk [S, rows, C] of rows that begin at `at_SRC`, which includes the columns' offsets."""
    CHUNK: tl.constexpr = SLICES * COLUMNS
    if (chunk + 1) * CHUNK <= DEPTH and not MASK_ROWS:
        return tl.load(at_SRC + chunk * CHUNK, eviction_policy=POLICY)
    else:
        d_SC = (
            chunk * CHUNK + tl.arange(0, SLICES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        )
        mask_SRC = (d_SC < DEPTH)[:, None, :] & keep_R[None, :, None]
        return tl.load(at_SRC + chunk * CHUNK, mask=mask_SRC, other=0.0, eviction_policy=POLICY)


@triton.jit
def _slice_dot(x_STC, w_SOC, acc_STO, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies bf16 as raw integers
        x_STC = x_STC.to(tl.float32)
        w_SOC = w_SOC.to(tl.float32)
    return tl.dot(x_STC, tl.permute(w_SOC, (0, 2, 1)), acc_STO, input_precision="ieee")


@triton.jit
def _first_slices(w_at, up_at, all_O, DEPTH: tl.constexpr, SLICES: tl.constexpr,
                  COLUMNS: tl.constexpr, AHEAD: tl.constexpr, SILU_MUL: tl.constexpr):  # fmt: skip
    """The first AHEAD chunks of the weights and of up's weights."""
    w, up = (), ()
    for chunk in tl.static_range((DEPTH + SLICES * COLUMNS - 1) // (SLICES * COLUMNS)):
        if chunk < AHEAD:
            w += (_load_slices(w_at, chunk, all_O, DEPTH, SLICES, COLUMNS, False, "evict_first"),)
            if SILU_MUL:
                up += (
                    _load_slices(up_at, chunk, all_O, DEPTH, SLICES, COLUMNS, False, "evict_first"),
                )
    return w, up


@triton.jit
def _norm_factor(x_at, real_T, eps, ROWS_P: tl.constexpr, DEPTH: tl.constexpr,
                 SLICES: tl.constexpr, COLUMNS: tl.constexpr, MASK_T: tl.constexpr,
                 HAS_NORM: tl.constexpr):  # fmt: skip
    """The factor of each row's RMS norm, [1, T, 1], and the last chunk of x; 1 twice unless
    HAS_NORM."""
    factor_1T1 = tl.full((1, ROWS_P, 1), 1.0, tl.float32)
    x_STC = factor_1T1
    if HAS_NORM:
        square_T = tl.zeros((ROWS_P,), tl.float32)
        for chunk in tl.static_range((DEPTH + SLICES * COLUMNS - 1) // (SLICES * COLUMNS)):
            x_STC = _load_slices(x_at, chunk, real_T, DEPTH, SLICES, COLUMNS, MASK_T, "evict_last")
            square_T += tl.sum(tl.sum(x_STC.to(tl.float32) * x_STC.to(tl.float32), 2), 0)
        factor_1T1 = tl.rsqrt(square_T / DEPTH + eps)[None, :, None]
    return factor_1T1, x_STC


@triton.jit
def _slice_sums(w, up, w_at, up_at, x_at, norm_ptr, factor_1T1, x_STC, d_SC, all_O, real_T,
                dtype: tl.constexpr, ROWS_P: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
                SLICES: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
                MASK_T: tl.constexpr, HAS_NORM: tl.constexpr, SILU_MUL: tl.constexpr,
                UPCAST: tl.constexpr):  # fmt: skip
    """(x · weightᵀ, x · upᵀ) of each slice over all chunks. The first are loaded."""
    CHUNK: tl.constexpr = SLICES * COLUMNS
    NUM_CHUNKS: tl.constexpr = (DEPTH + CHUNK - 1) // CHUNK
    acc_STO = tl.zeros((SLICES, ROWS_P, OUTS), tl.float32)
    acc_up_STO = tl.zeros((SLICES, ROWS_P, OUTS), tl.float32)
    for chunk in tl.static_range(NUM_CHUNKS):
        if chunk + AHEAD < NUM_CHUNKS:
            w += (
                _load_slices(
                    w_at, chunk + AHEAD, all_O, DEPTH, SLICES, COLUMNS, False, "evict_first"
                ),
            )
            if SILU_MUL:
                up += (
                    _load_slices(
                        up_at, chunk + AHEAD, all_O, DEPTH, SLICES, COLUMNS, False, "evict_first"
                    ),
                )
        if NUM_CHUNKS > 1 or not HAS_NORM:  # the norm has already loaded a single chunk, x_STC
            x_STC = _load_slices(x_at, chunk, real_T, DEPTH, SLICES, COLUMNS, MASK_T, "evict_last")
        if HAS_NORM:
            d_mask_SC = chunk * CHUNK + d_SC < DEPTH
            norm_SC = tl.load(norm_ptr + chunk * CHUNK + d_SC, mask=d_mask_SC, other=0.0).to(
                tl.float32
            )
            x_STC = (
                (x_STC.to(tl.float32) * factor_1T1).to(dtype).to(tl.float32) * norm_SC[:, None, :]
            ).to(dtype)
        acc_STO = _slice_dot(x_STC, w[chunk], acc_STO, UPCAST)
        if SILU_MUL:
            acc_up_STO = _slice_dot(x_STC, up[chunk], acc_up_STO, UPCAST)
    return acc_STO, acc_up_STO


@triton.jit
def skinny_gemm_kernel(
    x_ptr,  # [T, D]
    norm_ptr,  # [D], read if HAS_NORM
    weight_ptr,  # [outputs, D]
    bias_ptr,  # [outputs], read if HAS_BIAS
    residual_ptr,  # [T, NUM_OUTS], read if HAS_RESIDUAL
    out_ptr,  # [T, NUM_OUTS], written
    x_stride,
    weight_stride,
    eps,
    NUM_ROWS: tl.constexpr,
    ROWS_P: tl.constexpr,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTS: tl.constexpr,
    SLICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH_P: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU_MUL: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """A chunk is S products [T, C] × [C, O], one per warp; their sums are added at the end."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    MASK_T: tl.constexpr = NUM_ROWS < ROWS_P
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o_O = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row_O = tl.minimum(o_O, NUM_OUTS - 1)
    row_T = tl.arange(0, ROWS_P)
    all_O, real_T = row_O >= 0, row_T < NUM_ROWS
    d_SC = tl.arange(0, SLICES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    d_S1C = d_SC[:, None, :]
    w_at = weight_ptr + row_O.to(tl.int64)[None, :, None] * weight_stride + d_S1C
    up_at = w_at + NUM_OUTS * weight_stride.to(tl.int64)
    x_at = x_ptr + row_T[None, :, None] * x_stride + d_S1C

    w, up = _first_slices(w_at, up_at, all_O, DEPTH, SLICES, COLUMNS, AHEAD, SILU_MUL)
    prefetch_and_wait(
        weight_ptr + row_O.to(tl.int64) * weight_stride, NUM_OUTS * weight_stride.to(tl.int64),
        AHEAD * SLICES * COLUMNS, DEPTH, PREFETCH_P, SILU_MUL, PDL,
    )  # fmt: skip
    mask_TO = real_T[:, None] & (o_O < NUM_OUTS)[None, :]
    at_TO = row_T[:, None] * NUM_OUTS + o_O[None, :]
    if HAS_RESIDUAL:
        residual_TO = tl.load(residual_ptr + at_TO, mask=mask_TO, other=0.0)

    factor_1T1, x_STC = _norm_factor(
        x_at, real_T, eps, ROWS_P, DEPTH, SLICES, COLUMNS, MASK_T, HAS_NORM
    )
    acc_STO, acc_up_STO = _slice_sums(
        w, up, w_at, up_at, x_at, norm_ptr, factor_1T1, x_STC, d_SC, all_O, real_T, dtype, ROWS_P,
        OUTS, DEPTH, SLICES, COLUMNS, AHEAD, MASK_T, HAS_NORM, SILU_MUL, UPCAST,
    )  # fmt: skip

    y_TO = tl.sum(acc_STO, 0)
    up_TO = y_TO
    if SILU_MUL:
        up_TO = tl.sum(acc_up_STO, 0)
    if HAS_BIAS:
        y_TO += tl.load(bias_ptr + row_O).to(tl.float32)[None, :]
        if SILU_MUL:
            up_TO += tl.load(bias_ptr + NUM_OUTS + row_O).to(tl.float32)[None, :]
    y_TO = finish(y_TO, up_TO, dtype, SILU_MUL)
    if HAS_RESIDUAL:
        y_TO = (y_TO.to(tl.float32) + residual_TO.to(tl.float32)).to(dtype)
    tl.store(out_ptr + at_TO, y_TO, mask=mask_TO)


def tile_constants(tile: SkinnyTile, num_outs: int, depth: int) -> dict[str, Any]:
    """The constants that all kernels of a tile have."""
    rest = max(0, depth - tile.ahead * tile.slices * tile.columns)
    return {
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "OUTS": tile.outs,
        "COLUMNS": tile.columns,
        "AHEAD": tile.ahead,
        "PREFETCH_P": triton.next_power_of_2(-(-rest // 64)) if tile.prefetch and rest else 0,
    }


def kernel_for(
    num_rows: int,
    num_outs: int,
    depth: int,
    has_norm: bool,
    has_bias: bool,
    has_residual: bool,
    silu_mul: bool,
    interpreted: bool,
    launch: SkinnyTile | None = None,
) -> tuple[Any, dict[str, Any], int]:
    """(kernel, its constants, warps) for one case."""
    tile = launch or skinny_tile(num_rows, num_outs, depth, silu_mul)
    constants = {
        **tile_constants(tile, num_outs, depth),
        "HAS_NORM": has_norm,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": has_residual,
        "SILU_MUL": silu_mul,
    }
    if num_rows == 1 and tile.slices == 1:
        return gemv_kernel, constants | {"WARPS": tile.num_warps}, tile.num_warps
    rows = {"NUM_ROWS": num_rows, "ROWS_P": triton.next_power_of_2(num_rows)}
    return (
        skinny_gemm_kernel,
        constants | rows | {"SLICES": tile.slices, "UPCAST": interpreted},
        tile.num_warps,
    )


def skinny_gemm(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu_mul: bool,
    launch: SkinnyTile | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """`reference.linear.fused_linear` for up to MAX_ROWS rows of bf16 or fp16, last strides 1.

    The weights (including the norm's weight and the bias) may be read before earlier kernels end,
    so no running kernel may write them. `launch` and `pdl` override the tile and programmatic
    dependent launch, for measurements.
    """
    num_rows, depth = x_TD.shape
    num_outs = weight_OD.shape[0] // 2 if silu_mul else weight_OD.shape[0]
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=x_TD.device)
    kernel, constants, num_warps = kernel_for(
        num_rows,
        num_outs,
        depth,
        norm_weight_D is not None,
        bias_O is not None,
        residual_TO is not None,
        silu_mul,
        x_TD.device.type != "cuda",
        launch,
    )
    kernel[(triton.cdiv(num_outs, constants["OUTS"]),)](
        x_TD,
        x_TD if norm_weight_D is None else norm_weight_D,
        weight_OD,
        x_TD if bias_O is None else bias_O,
        x_TD if residual_TO is None else residual_TO,
        out_TO,
        *(() if kernel is gemv_kernel else (x_TD.stride(0),)),
        weight_OD.stride(0),
        eps,
        **constants,
        num_warps=num_warps,
        **(launch_options(x_TD.device) if pdl is not False else {"PDL": False}),
    )
    return out_TO
