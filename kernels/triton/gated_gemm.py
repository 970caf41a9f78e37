"""silu(x · gateᵀ) · (x · upᵀ) with up to 256 rows and large weights (8B), in Triton.

The time of such a product is that of reading its weights, if every multiprocessor loads its share
of them all the time. cuBLAS cuts the outputs into powers of two: the 24576 of Qwen3-8B into 192
tiles of 128, for 132 multiprocessors. Here a tile may be 128 and 64 outputs side by side, two
products with the same rows, so that 128 tiles fill the device in one round.

The weights are the left operand of the matrix units, which take it in pieces of 64. The rows are
the right operand, which may have as few as 8. A tile of weights alternates between 8 outputs of
gate and the same 8 of up. A thread holds results that are 8 apart, so both factors of a product are
in its registers. docs/log.md has the measurements.

Shapes: T rows (tokens) | D depth (inner size) | O weight rows of a tile, half of them gate's | C
columns of a chunk
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import (
    dot,
    finish,
    launch_options,
    num_multiprocessors,
    shared_memory_bytes,
)
from nanovllm.kernels.triton.split_k_gemm import SMALL_WEIGHT


class GatedTile(NamedTuple):
    """The sizes of a launch.

    Rows, weight rows of the first and of the second product (0: there is none), columns of a chunk,
    chunks in flight, warps.
    """

    rows: int
    first: int
    second: int
    columns: int
    num_stages: int
    num_warps: int


@triton.jit
def _weight_rows(out, NUM_OUTS: tl.constexpr, LINES: tl.constexpr):
    """LINES rows of [gate | up] for the outputs from `out`: 8 of gate, the same 8 of up, and on."""
    i_O = tl.arange(0, LINES)
    return out + i_O // 16 * 8 + i_O % 8 + i_O // 8 % 2 * NUM_OUTS


@triton.jit
def _load_rows(at_TC, real_T1, ALL: tl.constexpr):
    """Loads zeros for rows past the last.

    Reading the last row in their place would be slow: see split_k_gemm.py.
    """
    if ALL:
        return tl.load(at_TC)
    else:
        return tl.load(at_TC, mask=real_T1, other=0.0)


@triton.jit
def _store(
    acc_OT, out, row_T, num_rows, bias_ptr, out_ptr, NUM_OUTS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Stores the outputs from `out`; the sums are in the order of `_weight_rows`."""
    LINES: tl.constexpr = acc_OT.shape[0]
    ROWS: tl.constexpr = acc_OT.shape[1]
    if HAS_BIAS:
        acc_OT += tl.load(bias_ptr + _weight_rows(out, NUM_OUTS, LINES)).to(tl.float32)[:, None]
    pairs = tl.permute(tl.reshape(acc_OT, (LINES // 16, 2, 8, ROWS)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    y = tl.reshape(finish(gate, up, out_ptr.dtype.element_ty, True), (LINES // 2, ROWS))
    o = out + tl.arange(0, LINES // 2)
    tl.store(
        out_ptr + row_T[:, None] * NUM_OUTS + o[None, :],
        tl.trans(y),
        mask=(row_T < num_rows)[:, None],
    )


@triton.jit(do_not_specialize=["num_rows"])
def gated_gemm_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [2 · NUM_OUTS, D], gate's rows first
    bias_ptr,  # [2 · NUM_OUTS], read if HAS_BIAS
    out_ptr,  # [T, NUM_OUTS], written
    x_stride,
    weight_stride,
    num_rows,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    first_out = tl.program_id(0) * ((FIRST + SECOND) // 2)
    second_out = first_out + FIRST // 2
    d_C = tl.arange(0, COLUMNS)
    row_T = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real_T1 = (row_T < num_rows)[:, None]
    x_at = x_ptr + row_T.to(tl.int64)[:, None] * x_stride + d_C[None, :]
    first_O = _weight_rows(first_out, NUM_OUTS, FIRST)
    w_at = weight_ptr + first_O.to(tl.int64)[:, None] * weight_stride + d_C[None, :]
    acc_OT = tl.zeros((FIRST, ROWS), tl.float32)
    if SECOND > 0:
        second_O = _weight_rows(second_out, NUM_OUTS, SECOND)
        more_at = weight_ptr + second_O.to(tl.int64)[:, None] * weight_stride + d_C[None, :]
        more_OT = tl.zeros((SECOND, ROWS), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for chunk in tl.range(0, DEPTH // COLUMNS, num_stages=STAGES):
        x_TC = _load_rows(x_at + chunk * COLUMNS, real_T1, ALL_ROWS)
        acc_OT = dot(tl.load(w_at + chunk * COLUMNS), tl.trans(x_TC), acc_OT, UPCAST)
        if SECOND > 0:
            more_OT = dot(tl.load(more_at + chunk * COLUMNS), tl.trans(x_TC), more_OT, UPCAST)
    _store(acc_OT, first_out, row_T, num_rows, bias_ptr, out_ptr, NUM_OUTS, HAS_BIAS)
    if SECOND > 0:
        _store(more_OT, second_out, row_T, num_rows, bias_ptr, out_ptr, NUM_OUTS, HAS_BIAS)


# Maximum rows → tiles, the preferred one first. Measured on an H200 for Qwen3-8B. cuBLAS is faster
# from 65 to 96 rows, where a tile of 128 would be half empty, and from 129 to 208.
TILES: dict[int, tuple[GatedTile, ...]] = {
    16: (GatedTile(16, 64, 0, 128, 3, 4), GatedTile(16, 128, 64, 128, 4, 4)),
    32: (GatedTile(32, 64, 0, 128, 3, 4), GatedTile(32, 128, 64, 128, 4, 4)),
    64: (GatedTile(64, 128, 64, 128, 3, 4),),
    96: (),
    128: (GatedTile(128, 128, 64, 64, 5, 4),),
    208: (),
    256: (GatedTile(256, 128, 64, 64, 4, 8),),
}
MIN_EVENNESS = 0.9


def gated_tile(
    num_rows: int, num_outs: int, depth: int, shared_bytes: int, multiprocessors: int
) -> GatedTile | None:
    """The tile that beats cuBLAS with a separate activation, or None.

    The weight is [2 · num_outs, depth].

    A tile must divide the shape, fit the `shared_bytes` of a program, and leave few multiprocessors
    idle in its last round.
    """
    rung = next((rows for rows in TILES if num_rows <= rows), None)
    for tile in TILES[rung] if rung else ():
        lines = tile.first + tile.second
        if 2 * num_outs % lines or depth % tile.columns or shared_bytes_of(tile) > shared_bytes:
            continue
        at_once = multiprocessors * ((shared_bytes + 1024) // shared_bytes_of(tile))
        rounds = 2 * num_outs // lines / at_once
        if rounds >= MIN_EVENNESS * math.ceil(rounds):
            return tile
    return None


def shared_bytes_of(tile: GatedTile) -> int:
    """Shared memory of one program: its chunks in flight, and 1 KB that the hardware reserves."""
    return tile.num_stages * (tile.rows + tile.first + tile.second) * tile.columns * 2 + 1024


def takes(x_TD: Tensor, weight_OD: Tensor) -> bool:
    """True if `gated_gemm` has a tile for these.

    The smaller weights of a 0.6B model have tiles in split_k_gemm.py.
    """
    return weight_OD.numel() > SMALL_WEIGHT and _tile_for(x_TD, weight_OD) is not None


def _tile_for(x_TD: Tensor, weight_OD: Tensor) -> GatedTile | None:
    (weight_rows, depth), device = weight_OD.shape, x_TD.device
    return gated_tile(
        x_TD.shape[0],
        weight_rows // 2,
        depth,
        shared_memory_bytes(device),
        num_multiprocessors(device),
    )


def gated_gemm(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    launch: GatedTile | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """silu(gate) · up of x · weightᵀ + bias; see `reference.linear.fused_linear`.

    gate is the first half of the outputs and up the second. bf16 or fp16, last strides 1. `launch`
    and `pdl` override the tile and programmatic dependent launch, for measurements.
    """
    num_rows, depth = x_TD.shape
    num_outs = weight_OD.shape[0] // 2
    tile = launch or _tile_for(x_TD, weight_OD)
    if tile is None:
        raise ValueError(f"no tile for weights of {2 * num_outs} x {depth}")
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=x_TD.device)
    grid = (num_outs // ((tile.first + tile.second) // 2), triton.cdiv(num_rows, tile.rows))
    gated_gemm_kernel[grid](
        x_TD,
        weight_OD,
        x_TD if bias_O is None else bias_O,
        out_TO,
        x_TD.stride(0),
        weight_OD.stride(0),
        num_rows,
        **gated_constants(num_rows, num_outs, depth, bias_O is not None, tile),
        UPCAST=x_TD.device.type != "cuda",
        num_warps=tile.num_warps,
        **(launch_options(x_TD.device) if pdl is not False else {"PDL": False}),
    )
    return out_TO


def gated_constants(
    num_rows: int, num_outs: int, depth: int, has_bias: bool, tile: GatedTile
) -> dict[str, int]:
    """The kernel's compile-time constants."""
    return {
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "ROWS": tile.rows,
        "ALL_ROWS": num_rows % tile.rows == 0,
        "FIRST": tile.first,
        "SECOND": tile.second,
        "COLUMNS": tile.columns,
        "STAGES": tile.num_stages,
        "HAS_BIAS": has_bias,
    }
