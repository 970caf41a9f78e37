"""Products with 17 to 256 rows (a decode batch), fused with what follows them, in Triton.

x · weightᵀ + bias (→ SiLU·up) (+ residual). Such a product takes a few microseconds. Reading the
weights from memory and the reads of all programs from the L2 bound it, and launch and first loads
are a large part of its time. So programs are placed while the kernel before still runs
(programmatic dependent launch, sm_90), and the operations that follow are fused, which saves
launches. With few outputs the depth is split between programs: each writes a partial result in
fp32, and the last to arrive adds the parts in their order, so every run gives the same bits.

The RMS norm before is not fused: x would pass through registers on its way to the matrix units,
which is slower. docs/log.md has the measurements.

Shapes: T rows (tokens) | D depth (inner size) | O outputs of one program | C columns of a chunk
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import (
    arrival_counters,
    dot,
    finish,
    launch_options,
    prefetch_and_wait,
    shared_memory_bytes,
)

MAX_ROWS = 256
SMALL_WEIGHT = 6144 * 1024  # elements: up to this size cuBLAS is slower for any number of rows


class SplitKTile(NamedTuple):
    """The sizes of a launch.

    Rows and outputs of one program, columns of a chunk, parts of the depth, chunks in flight,
    warps.

    `prefetch`: a program prefetches its weights into the L2 before it waits for the kernel before.
    """

    rows: int
    outs: int
    columns: int
    splits: int
    num_stages: int
    num_warps: int
    prefetch: bool = False


@triton.jit
def _load_chunk(at, chunk, d_C, real_L, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
                ALL: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Columns of one chunk of lines that begin at `at`, [L, C], which includes the offsets d_C.

    Zeros past the depth and, unless ALL, for lines that are not real.
    """
    if EXACT and ALL:
        return tl.load(at + chunk * COLUMNS)
    elif EXACT:
        return tl.load(at + chunk * COLUMNS, mask=real_L[:, None], other=0.0)
    else:
        mask_LC = real_L[:, None] & (chunk * COLUMNS + d_C < DEPTH)[None, :]
        return tl.load(at + chunk * COLUMNS, mask=mask_LC, other=0.0)


@triton.jit
def _store_part(part_ptr, split, part, at_TO, mask_TO, acc_TO, up_TO, SILU_MUL: tl.constexpr):
    """Stores a split's partial results; one tensor of them has `part` numbers."""
    each = 2 * part if SILU_MUL else part
    tl.store(part_ptr + split * each + at_TO, acc_TO, mask=mask_TO)
    if SILU_MUL:
        tl.store(part_ptr + split * each + part + at_TO, up_TO, mask=mask_TO)


@triton.jit
def _sum_of_parts(part_ptr, part, at_TO, mask_TO, ROWS: tl.constexpr, OUTS: tl.constexpr,
                  SPLITS: tl.constexpr, SILU_MUL: tl.constexpr):  # fmt: skip
    """The sums of the partial results of all splits, in the order of splits."""
    each = 2 * part if SILU_MUL else part
    acc_TO, up_TO = tl.zeros((ROWS, OUTS), tl.float32), tl.zeros((ROWS, OUTS), tl.float32)
    for i in tl.static_range(SPLITS):
        # other multiprocessors wrote these, so .cg bypasses L1
        acc_TO += tl.load(
            part_ptr + i * each + at_TO, mask=mask_TO, other=0.0, cache_modifier=".cg"
        )
        if SILU_MUL:
            up_TO += tl.load(
                part_ptr + i * each + part + at_TO, mask=mask_TO, other=0.0, cache_modifier=".cg"
            )
    return acc_TO, up_TO


@triton.jit(do_not_specialize=["num_rows"])
def split_k_gemm_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [outputs, D]
    bias_ptr,  # [outputs], read if HAS_BIAS
    residual_ptr,  # [T, NUM_OUTS], read if HAS_RESIDUAL
    out_ptr,  # [T, NUM_OUTS], written
    part_ptr,  # [SPLITS, 1 or 2, T, NUM_OUTS] fp32, written if SPLITS > 1
    arrived_ptr,  # [programs of one split] int32: zero before and after each launch
    x_stride,
    weight_stride,
    num_rows,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    LINES_P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU_MUL: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = (DEPTH + COLUMNS * SPLITS - 1) // (COLUMNS * SPLITS)
    SHARE: tl.constexpr = CHUNKS * COLUMNS
    EXACT: tl.constexpr = SHARE * SPLITS == DEPTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(2)
    o_O = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row_T = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d_C = split * SHARE + tl.arange(0, COLUMNS)
    # Rows past the last are zeros. If they read the last row instead, all programs would load the
    # same few lines from the L2: twice the time for 160 rows.
    real_T = row_T < num_rows
    x_T = x_ptr + row_T.to(tl.int64) * x_stride
    # outputs past the last recompute the last and are not stored
    real_O = o_O < NUM_OUTS
    w_O = weight_ptr + tl.minimum(o_O, NUM_OUTS - 1).to(tl.int64) * weight_stride
    up_O = w_O + NUM_OUTS * weight_stride.to(tl.int64)
    prefetch_and_wait(
        w_O + split * SHARE, NUM_OUTS * weight_stride.to(tl.int64), 0, SHARE, LINES_P, SILU_MUL, PDL
    )

    mask_TO = real_T[:, None] & real_O[None, :]
    at_TO = row_T[:, None] * NUM_OUTS + o_O[None, :]
    if HAS_RESIDUAL:  # loaded early, so that the end of the program does not wait for it
        residual_TO = tl.load(residual_ptr + at_TO, mask=mask_TO, other=0.0)
    x_at, w_at, up_at = (
        x_T[:, None] + d_C[None, :],
        w_O[:, None] + d_C[None, :],
        up_O[:, None] + d_C[None, :],
    )
    acc_TO, up_TO = tl.zeros((ROWS, OUTS), tl.float32), tl.zeros((ROWS, OUTS), tl.float32)
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        x_TC = _load_chunk(x_at, chunk, d_C, real_T, DEPTH, COLUMNS, ALL_ROWS, EXACT)
        w_OC = _load_chunk(w_at, chunk, d_C, real_O, DEPTH, COLUMNS, True, EXACT)
        acc_TO = dot(x_TC, tl.trans(w_OC), acc_TO, UPCAST)
        if SILU_MUL:
            up_OC = _load_chunk(up_at, chunk, d_C, real_O, DEPTH, COLUMNS, True, EXACT)
            up_TO = dot(x_TC, tl.trans(up_OC), up_TO, UPCAST)

    if SPLITS > 1:
        part = num_rows * NUM_OUTS
        _store_part(part_ptr, split, part, at_TO, mask_TO, acc_TO, up_TO, SILU_MUL)
        # all threads store before the one thread's release; its acquire comes before all loads
        tl.debug_barrier()
        arrived_at = arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu") != SPLITS - 1:
            return
        tl.store(arrived_at, 0)
        acc_TO, up_TO = _sum_of_parts(part_ptr, part, at_TO, mask_TO, ROWS, OUTS, SPLITS, SILU_MUL)
    if HAS_BIAS:
        acc_TO += tl.load(bias_ptr + o_O, mask=o_O < NUM_OUTS, other=0.0).to(tl.float32)[None, :]
        if SILU_MUL:
            up_TO += tl.load(bias_ptr + NUM_OUTS + o_O, mask=o_O < NUM_OUTS, other=0.0).to(
                tl.float32
            )[None, :]
    y_TO = finish(acc_TO, up_TO, dtype, SILU_MUL)
    if HAS_RESIDUAL:
        y_TO = (y_TO.to(tl.float32) + residual_TO.to(tl.float32)).to(dtype)
    tl.store(out_ptr + at_TO, y_TO, mask=mask_TO)


# (outputs, depth, silu·up): tiles for up to 32, 64, 128 and 256 rows. Measured on an H200 by
# scripts/bench/bench_linear.py.
TILES: dict[tuple[int, int, bool], tuple[SplitKTile, ...]] = {
    # Qwen3-0.6B: qkv, out, gate_up, down
    (4096, 1024, False): (
        SplitKTile(32, 64, 128, 1, 6, 4, True), SplitKTile(64, 32, 128, 1, 6, 4),
        SplitKTile(64, 64, 128, 1, 6, 4),
        SplitKTile(128, 64, 64, 1, 6, 4),
    ),
    (1024, 2048, False): (
        SplitKTile(32, 32, 128, 2, 6, 4, True), SplitKTile(64, 32, 128, 2, 6, 4, True),
        SplitKTile(64, 32, 128, 1, 6, 4, True),
        SplitKTile(64, 32, 128, 1, 6, 4),
    ),
    (3072, 1024, True): (
        SplitKTile(32, 64, 128, 1, 4, 4), SplitKTile(64, 32, 128, 1, 6, 4),
        SplitKTile(128, 32, 64, 1, 6, 4),
        SplitKTile(128, 64, 64, 1, 4, 8),
    ),
    (1024, 3072, False): (
        SplitKTile(32, 64, 128, 4, 6, 4, True), SplitKTile(64, 32, 128, 4, 6, 4),
        SplitKTile(64, 32, 128, 2, 6, 4, True),
        SplitKTile(64, 32, 128, 1, 6, 4),
    ),
    # Qwen3-30B-A3B: qkv, out
    (5120, 2048, False): (SplitKTile(32, 64, 128, 1, 6, 4), SplitKTile(64, 64, 128, 1, 6, 4)),
    (2048, 4096, False): (SplitKTile(32, 64, 128, 4, 6, 4), SplitKTile(64, 32, 128, 2, 6, 4)),
    # Qwen3-8B: qkv, out, down
    (6144, 4096, False): (SplitKTile(32, 64, 128, 1, 6, 4), SplitKTile(64, 64, 128, 1, 6, 4)),
    (4096, 4096, False): (SplitKTile(32, 64, 128, 2, 6, 4), SplitKTile(64, 32, 128, 1, 6, 4)),
    (4096, 12288, False): (
        SplitKTile(32, 64, 128, 2, 6, 4), SplitKTile(64, 32, 128, 1, 6, 4),
        SplitKTile(128, 64, 128, 2, 4, 4),
    ),
}  # fmt: skip


def max_rows(num_outs: int, depth: int) -> int:
    """The most rows for which this beats cuBLAS; 0: never.

    The weight is [num_outs, depth], without a norm before.

    For the qkv of an 8B model cuBLAS alone is faster, but up to 64 rows a layer is faster with this
    kernel, because its launches overlap.
    """
    if num_outs * depth <= SMALL_WEIGHT:
        return MAX_ROWS
    if depth <= 4096:
        return 64 if num_outs <= 6144 else 0
    return 128 if num_outs <= 4096 else 0


def split_k_tile(
    num_rows: int, num_outs: int, depth: int, silu_mul: bool, shared_bytes: int
) -> SplitKTile:
    """The measured tile; for other shapes the tile that was fast for most of these.

    With less shared memory it has fewer stages.
    """
    rung = next((i for i, rows in enumerate((32, 64, 128)) if num_rows <= rows), 3)
    known = TILES.get((num_outs, depth, silu_mul), ())
    if rung < len(known):
        tile = known[rung]
    else:
        rows, outs = ((32, 64), (64, 32), (64, 64 if num_outs > 2048 else 32), (128, 64))[rung]
        columns = 128 if rows < 128 and depth >= 128 else 64
        programs = triton.cdiv(num_rows, rows) * triton.cdiv(num_outs, outs)
        splits = next((n for n in (4, 2) if programs * n <= 132 and depth >= n * columns * 4), 1)
        tile = SplitKTile(rows, outs, columns, splits, 6, 4)
    stage_bytes = (tile.rows + tile.outs * (1 + silu_mul)) * tile.columns * 2
    # 64 KB do not hold two stages of the largest tiles
    while 2 * stage_bytes > shared_bytes - 2048 and tile.columns > 32:
        tile, stage_bytes = tile._replace(columns=tile.columns // 2), stage_bytes // 2
    return tile._replace(
        num_stages=max(2, min(tile.num_stages, (shared_bytes - 2048) // stage_bytes))
    )


def split_k_constants(
    num_rows: int,
    num_outs: int,
    depth: int,
    has_bias: bool,
    has_residual: bool,
    silu_mul: bool,
    tile: SplitKTile,
) -> dict[str, int]:
    """The kernel's compile-time constants."""
    share = triton.cdiv(depth, tile.columns * tile.splits) * tile.columns
    return {
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "ROWS": tile.rows,
        "ALL_ROWS": num_rows % tile.rows == 0,
        "OUTS": tile.outs,
        "COLUMNS": tile.columns,
        "SPLITS": tile.splits,
        "STAGES": tile.num_stages,
        "LINES_P": triton.next_power_of_2(share // 64)
        if tile.prefetch and share * tile.splits == depth
        else 0,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": has_residual,
        "SILU_MUL": silu_mul,
    }


def split_k_gemm(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    silu_mul: bool,
    launch: SplitKTile | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """x · weightᵀ + bias, then silu(gate) · up, then + residual; see
    `reference.linear.fused_linear`.

    bf16 or fp16, last strides 1. The weights may be prefetched before earlier kernels end. `launch`
    and `pdl` override the tile and programmatic dependent launch, for measurements.
    """
    num_rows, depth = x_TD.shape
    num_outs = weight_OD.shape[0] // 2 if silu_mul else weight_OD.shape[0]
    device = x_TD.device
    tile = launch or split_k_tile(num_rows, num_outs, depth, silu_mul, shared_memory_bytes(device))
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=device)
    grid = (triton.cdiv(num_outs, tile.outs), triton.cdiv(num_rows, tile.rows), tile.splits)
    part, arrived = out_TO, out_TO
    if tile.splits > 1:
        part = torch.empty(
            tile.splits * (1 + silu_mul) * num_rows * num_outs, dtype=torch.float32, device=device
        )
        arrived = arrival_counters(device, grid[0] * grid[1])
    split_k_gemm_kernel[grid](
        x_TD,
        weight_OD,
        x_TD if bias_O is None else bias_O,
        x_TD if residual_TO is None else residual_TO,
        out_TO,
        part,
        arrived,
        x_TD.stride(0),
        weight_OD.stride(0),
        num_rows,
        **split_k_constants(
            num_rows, num_outs, depth, bias_O is not None, residual_TO is not None, silu_mul, tile
        ),
        UPCAST=device.type != "cuda",
        num_warps=tile.num_warps,
        **(launch_options(device) if pdl is not False else {"PDL": False}),
    )
    return out_TO
