"""Products with some rows (17 to 256, a decode batch) in Triton: x · weightᵀ + bias (→ SiLU·up).

A product of this size takes a few microseconds: it is bound by the weights' way from memory and by what every program
reads from the L2, and a third of its time is launch and first loads. So here, too, weights are asked for before the wait
for the kernel before (programmatic dependent launch, sm_90): each program prefetches its share of the weights into the
L2, waits, and then runs an ordinary pipelined loop over the depth. Where the outputs are few, the depth is split between
programs; each writes its fp32 part, and the last to arrive adds the parts up in their order, so that every run gives the
same bits.

Shapes: T rows (tokens) | D depth (inner size) | O outputs of one program | C columns of a chunk
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton_common import arrival_counters, launch_options, prefetch_rows

MAX_ROWS = 256


class GemmTile(NamedTuple):
    """How a launch is cut: rows and outputs of one program, columns of a chunk, parts of the depth, chunks in flight, warps;
    and whether the outputs stand along the matrix units' first dimension (at least 64 wide) in place of the rows.
    """

    rows: int
    outs: int
    columns: int
    splits: int
    num_stages: int
    num_warps: int
    swap: bool = False


@triton.jit
def _load_chunk(at, chunk, d_C, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr):
    """Columns of one chunk from `at`, which holds the offsets d_C within the first one; zeros beyond the depth."""
    if EXACT:
        return tl.load(at + chunk * COLUMNS)
    else:
        return tl.load(at + chunk * COLUMNS, mask=(chunk * COLUMNS + d_C < DEPTH)[None, :], other=0.0)


@triton.jit
def _dot(x_TC, w_OC, acc, SWAP: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies bf16 as raw integers
        x_TC = x_TC.to(tl.float32)
        w_OC = w_OC.to(tl.float32)
    if SWAP:
        return tl.dot(w_OC, tl.trans(x_TC), acc, input_precision="ieee")
    else:
        return tl.dot(x_TC, tl.trans(w_OC), acc, input_precision="ieee")


@triton.jit
def gemm_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [outputs, D]
    bias_ptr,  # [outputs], read if HAS_BIAS
    out_ptr,  # [T, NUM_OUTS], written
    part_ptr,  # [SPLITS, 1 or 2, T, NUM_OUTS] fp32, written if SPLITS > 1
    arrived_ptr,  # [programs of one split] int32: zero before and after each launch
    x_stride,
    weight_stride,
    NUM_ROWS: tl.constexpr,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    LINES_P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU_MUL: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = (DEPTH + COLUMNS * SPLITS - 1) // (COLUMNS * SPLITS)
    EXACT: tl.constexpr = CHUNKS * COLUMNS * SPLITS == DEPTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(2)
    o_O = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row_T = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d_C = split * (CHUNKS * COLUMNS) + tl.arange(0, COLUMNS)
    # rows and outputs beyond the last compute the last once more and are not stored
    w_O = weight_ptr + tl.minimum(o_O, NUM_OUTS - 1).to(tl.int64) * weight_stride
    up_O = w_O + NUM_OUTS * weight_stride.to(tl.int64)
    x_T = x_ptr + tl.minimum(row_T, NUM_ROWS - 1).to(tl.int64) * x_stride
    if PDL:
        if LINES_P > 0:
            prefetch_rows(w_O + split * (CHUNKS * COLUMNS), 0, CHUNKS * COLUMNS, LINES_P)
            if SILU_MUL:
                prefetch_rows(up_O + split * (CHUNKS * COLUMNS), 0, CHUNKS * COLUMNS, LINES_P)
        tl.extra.cuda.gdc_wait()

    x_at = x_T[:, None] + d_C[None, :]
    w_at = w_O[:, None] + d_C[None, :]
    up_at = up_O[:, None] + d_C[None, :]
    acc = tl.zeros((OUTS, ROWS) if SWAP else (ROWS, OUTS), tl.float32)
    acc_up = tl.zeros((OUTS, ROWS) if SWAP else (ROWS, OUTS), tl.float32)
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        x_TC = _load_chunk(x_at, chunk, d_C, DEPTH, COLUMNS, EXACT)
        acc = _dot(x_TC, _load_chunk(w_at, chunk, d_C, DEPTH, COLUMNS, EXACT), acc, SWAP, UPCAST)
        if SILU_MUL:
            acc_up = _dot(x_TC, _load_chunk(up_at, chunk, d_C, DEPTH, COLUMNS, EXACT), acc_up, SWAP, UPCAST)

    if SWAP:
        row, out = row_T[None, :], o_O[:, None]
    else:
        row, out = row_T[:, None], o_O[None, :]
    mask = (row < NUM_ROWS) & (out < NUM_OUTS)
    at = row * NUM_OUTS + out
    if SPLITS > 1:
        PART: tl.constexpr = NUM_ROWS * NUM_OUTS
        EACH: tl.constexpr = 2 * PART if SILU_MUL else PART
        tl.store(part_ptr + split * EACH + at, acc, mask=mask)
        if SILU_MUL:
            tl.store(part_ptr + split * EACH + PART + at, acc_up, mask=mask)
        # all threads' stores come before the one thread's release; its acquire comes before all threads' loads
        tl.debug_barrier()
        arrived_at = arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu") != SPLITS - 1:
            return
        tl.store(arrived_at, 0)
        acc, acc_up = tl.zeros_like(acc), tl.zeros_like(acc_up)
        for i in tl.static_range(SPLITS):
            # .cg: other multiprocessors wrote these, so L1 is not asked
            acc += tl.load(part_ptr + i * EACH + at, mask=mask, other=0.0, cache_modifier=".cg")
            if SILU_MUL:
                acc_up += tl.load(part_ptr + i * EACH + PART + at, mask=mask, other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out, mask=out < NUM_OUTS, other=0.0).to(tl.float32)
        if SILU_MUL:
            acc_up += tl.load(bias_ptr + NUM_OUTS + out, mask=out < NUM_OUTS, other=0.0).to(tl.float32)
    if SILU_MUL:  # rounded where the reference rounds
        gate = acc.to(dtype).to(tl.float32)
        acc = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * acc_up.to(dtype).to(tl.float32)
    tl.store(out_ptr + at, acc.to(dtype), mask=mask)


def gemm_tile(num_rows: int, num_outs: int, depth: int, silu_mul: bool) -> GemmTile:
    """The measured choice."""
    return GemmTile(64, 64, 64, 1, 4, 4)


def gemm_constants(
    num_rows: int, num_outs: int, depth: int, has_bias: bool, silu_mul: bool, tile: GemmTile
) -> dict[str, int]:
    """The kernel's compile-time constants."""
    chunks = triton.cdiv(depth, tile.columns * tile.splits)
    is_exact = chunks * tile.columns * tile.splits == depth
    return {
        "NUM_ROWS": num_rows,
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "ROWS": tile.rows,
        "OUTS": tile.outs,
        "COLUMNS": tile.columns,
        "SPLITS": tile.splits,
        "STAGES": tile.num_stages,
        "SWAP": tile.swap,
        "LINES_P": triton.next_power_of_2(triton.cdiv(chunks * tile.columns, 64)) if is_exact else 0,
        "HAS_BIAS": has_bias,
        "SILU_MUL": silu_mul,
    }


def gemm(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    silu_mul: bool,
    launch: GemmTile | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """x · weightᵀ + bias, then silu(gate) · up where `silu_mul`; see `reference.fused_linear`. bf16 or fp16, last strides 1.

    The weights and the bias may be read before earlier kernels are over. `launch` and `pdl` override the tile and
    programmatic dependent launch, for measurements.
    """
    num_rows, depth = x_TD.shape
    num_outs = weight_OD.shape[0] // 2 if silu_mul else weight_OD.shape[0]
    device = x_TD.device
    tile = launch or gemm_tile(num_rows, num_outs, depth, silu_mul)
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=device)
    grid = (triton.cdiv(num_outs, tile.outs), triton.cdiv(num_rows, tile.rows), tile.splits)
    part, arrived = out_TO, out_TO
    if tile.splits > 1:
        part = torch.empty(tile.splits * (1 + silu_mul) * num_rows * num_outs, dtype=torch.float32, device=device)
        arrived = arrival_counters(device, grid[0] * grid[1])
    options = launch_options(device) if pdl is not False else {"PDL": False}
    gemm_kernel[grid](
        x_TD,
        weight_OD,
        weight_OD if bias_O is None else bias_O,
        out_TO,
        part,
        arrived,
        x_TD.stride(0),
        weight_OD.stride(0),
        **gemm_constants(num_rows, num_outs, depth, bias_O is not None, silu_mul, tile),
        UPCAST=device.type != "cuda",
        num_warps=tile.num_warps,
        **options,
    )
    return out_TO
