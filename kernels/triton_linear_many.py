"""Products with 17 to 256 rows (a decode batch), fused with what follows, in Triton:
x · weightᵀ + bias (→ SiLU·up) (+ residual).

A product of this size takes a few microseconds. It is bound by the weights' way from memory and by what all programs
together read from the L2, and a good part of its time is launch and first loads. So programs are placed while the kernel
before still runs (programmatic dependent launch, sm_90), and what follows is taken in, which spares launches. Where the
outputs are few, the depth is split between programs; each writes its fp32 part, and the last to arrive adds the parts up
in their order, so that every run gives the same bits.

Tried and dropped: taking in the RMS norm before (x then has to pass through registers on its way into the matrix units:
10.6 µs in place of 7.4 for qkv of 0.6B at 32 rows, 2 to 3 times as long for 8B).

Shapes: T rows (tokens) | D depth (inner size) | O outputs of one program | C columns of a chunk
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.triton_common import arrival_counters, finish, launch_options, prefetch_rows

MAX_ROWS = 256


class GemmTile(NamedTuple):
    """How a launch is cut: rows and outputs of one program, columns of a chunk, parts of the depth, chunks in
    flight, warps; and whether a program asks its weights into the L2 before it waits for the kernel before.
    """

    rows: int
    outs: int
    columns: int
    splits: int
    num_stages: int
    num_warps: int
    prefetch: bool = False


@triton.jit
def _dot(x_TC, w_OC, acc_TO, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies bf16 as raw integers
        x_TC = x_TC.to(tl.float32)
        w_OC = w_OC.to(tl.float32)
    return tl.dot(x_TC, tl.trans(w_OC), acc_TO, input_precision="ieee")


@triton.jit
def many_rows_linear_kernel(
    x_desc,  # [T, D] by [ROWS, COLUMNS]
    weight_desc,  # [outputs, D] by [OUTS, COLUMNS]
    weight_ptr,  # the same weights, for the prefetch
    bias_ptr,  # [outputs], read if HAS_BIAS
    residual_ptr,  # [T, NUM_OUTS], read if HAS_RESIDUAL
    out_ptr,  # [T, NUM_OUTS], written
    part_ptr,  # [SPLITS, 1 or 2, T, NUM_OUTS] fp32, written if SPLITS > 1
    arrived_ptr,  # [programs of one split] int32: zero before and after each launch
    weight_stride,
    NUM_ROWS: tl.constexpr,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
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
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split, first_row, first_out = tl.program_id(2), tl.program_id(1) * ROWS, tl.program_id(0) * OUTS
    o_O, row_T = first_out + tl.arange(0, OUTS), first_row + tl.arange(0, ROWS)
    if PDL:
        if LINES_P > 0:
            w_O = weight_ptr + tl.minimum(o_O, NUM_OUTS - 1).to(tl.int64) * weight_stride + split * SHARE
            prefetch_rows(w_O, 0, SHARE, LINES_P)
            if SILU_MUL:
                prefetch_rows(w_O + NUM_OUTS * weight_stride.to(tl.int64), 0, SHARE, LINES_P)
        tl.extra.cuda.gdc_wait()

    # what a descriptor reads beyond its tensor is zero; outputs beyond the last are not stored
    acc_TO, up_TO = tl.zeros((ROWS, OUTS), tl.float32), tl.zeros((ROWS, OUTS), tl.float32)
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        column = split * SHARE + chunk * COLUMNS
        x_TC = x_desc.load([first_row, column])
        acc_TO = _dot(x_TC, weight_desc.load([first_out, column]), acc_TO, UPCAST)
        if SILU_MUL:
            up_TO = _dot(x_TC, weight_desc.load([NUM_OUTS + first_out, column]), up_TO, UPCAST)

    mask_TO = (row_T < NUM_ROWS)[:, None] & (o_O < NUM_OUTS)[None, :]
    at_TO = row_T[:, None] * NUM_OUTS + o_O[None, :]
    if SPLITS > 1:
        PART: tl.constexpr = NUM_ROWS * NUM_OUTS
        EACH: tl.constexpr = 2 * PART if SILU_MUL else PART
        tl.store(part_ptr + split * EACH + at_TO, acc_TO, mask=mask_TO)
        if SILU_MUL:
            tl.store(part_ptr + split * EACH + PART + at_TO, up_TO, mask=mask_TO)
        # all threads' stores come before the one thread's release; its acquire comes before all threads' loads
        tl.debug_barrier()
        arrived_at = arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu") != SPLITS - 1:
            return
        tl.store(arrived_at, 0)
        acc_TO, up_TO = tl.zeros((ROWS, OUTS), tl.float32), tl.zeros((ROWS, OUTS), tl.float32)
        for i in tl.static_range(SPLITS):
            # .cg: other multiprocessors wrote these, so L1 is not asked
            acc_TO += tl.load(part_ptr + i * EACH + at_TO, mask=mask_TO, other=0.0, cache_modifier=".cg")
            if SILU_MUL:
                up_TO += tl.load(part_ptr + i * EACH + PART + at_TO, mask=mask_TO, other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        acc_TO += tl.load(bias_ptr + o_O, mask=o_O < NUM_OUTS, other=0.0).to(tl.float32)[None, :]
        if SILU_MUL:
            up_TO += tl.load(bias_ptr + NUM_OUTS + o_O, mask=o_O < NUM_OUTS, other=0.0).to(tl.float32)[None, :]
    y_TO = finish(acc_TO, up_TO, dtype, SILU_MUL)
    if HAS_RESIDUAL:
        y_TO = (y_TO.to(tl.float32) + tl.load(residual_ptr + at_TO, mask=mask_TO, other=0.0).to(tl.float32)).to(dtype)
    tl.store(out_ptr + at_TO, y_TO, mask=mask_TO)


def gemm_tile(num_rows: int, num_outs: int, depth: int, silu_mul: bool) -> GemmTile:
    """The measured choice."""
    return GemmTile(64, 64, 64, 1, 4, 4)


def gemm_constants(
    num_rows: int, num_outs: int, depth: int, has_bias: bool, has_residual: bool, silu_mul: bool, tile: GemmTile
) -> dict[str, int]:
    """The kernel's compile-time constants."""
    share = triton.cdiv(depth, tile.columns * tile.splits) * tile.columns
    return {
        "NUM_ROWS": num_rows,
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "ROWS": tile.rows,
        "OUTS": tile.outs,
        "COLUMNS": tile.columns,
        "SPLITS": tile.splits,
        "STAGES": tile.num_stages,
        "LINES_P": triton.next_power_of_2(share // 64) if tile.prefetch and share * tile.splits == depth else 0,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": has_residual,
        "SILU_MUL": silu_mul,
    }


def supported(x_TD: Tensor, weight_OD: Tensor) -> bool:
    """Whether the copy engine can address both: rows that are 16 bytes, or a multiple, apart."""
    return all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
        for t in (x_TD, weight_OD)
    )


def many_rows_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    silu_mul: bool,
    launch: GemmTile | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """x · weightᵀ + bias, then silu(gate) · up, then + residual; see `reference.fused_linear`. bf16 or fp16, `supported`.

    The weights may be asked for before earlier kernels are over. `launch` and `pdl` override the tile and programmatic
    dependent launch, for measurements.
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
    many_rows_linear_kernel[grid](
        TensorDescriptor.from_tensor(x_TD, [tile.rows, tile.columns]),
        TensorDescriptor.from_tensor(weight_OD, [tile.outs, tile.columns]),
        weight_OD,
        x_TD if bias_O is None else bias_O,
        x_TD if residual_TO is None else residual_TO,
        out_TO,
        part,
        arrived,
        weight_OD.stride(0),
        **gemm_constants(num_rows, num_outs, depth, bias_O is not None, residual_TO is not None, silu_mul, tile),
        UPCAST=device.type != "cuda",
        num_warps=tile.num_warps,
        **(launch_options(device) if pdl is not False else {"PDL": False}),
    )
    return out_TO
