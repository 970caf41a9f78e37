"""Products of some rows with packed weights on the matrix units, in Triton.

x · weightᵀ + bias (→ SiLU·up) (+ residual), by the chunks of `packed_chunks.py`. The depth is split
between programs by the weight's shape alone, up to 64 rows, and the last program to arrive adds the
parts in their order. With SiLU·up a tile alternates between 8 outputs of gate and the same 8 of up,
as in gated_gemm.py.

Shapes: T rows (tokens) | L weight rows of a tile
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import arrival_counters, launch_options, shared_memory_bytes
from nanovllm.kernels.triton.packed_chunks import columns_of, lines_of, packed_sums, results_of
from nanovllm.kernels.triton.packed_codes import Codes
from nanovllm.kernels.triton.packed_tiles import PackedGemmTile, gemm_tile


@triton.jit(do_not_specialize=["num_rows"])
def packed_gemm_kernel(
    x_ptr,  # [T, D]
    code_ptr,  # [O, C]
    scale_ptr,  # [R, G]
    offset_ptr,  # [R, G], read if HAS_OFFSET
    table_ptr,
    bias_ptr,  # [O], read if HAS_BIAS
    residual_ptr,  # [T, NUM_OUTS], read if HAS_RESIDUAL
    out_ptr,  # [T, NUM_OUTS], written
    part_ptr,  # [SPLITS, tiles, L, ROWS] fp32, written if SPLITS > 1
    arrived_ptr,  # [tiles] int32: zero before and after each launch
    x_stride,
    num_rows,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU_MUL: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    HALF: tl.constexpr = COLUMNS * BITS // 8
    OUTS: tl.constexpr = LINES // 2 if SILU_MUL else LINES
    CHUNKS: tl.constexpr = DEPTH // COLUMNS
    STEPS: tl.constexpr = CHUNKS // (SPLITS * EACH)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, split = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.program_id(2)
    row_T = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real_T = row_T < num_rows
    line_L = lines_of(tl.program_id(0) * OUTS, NUM_OUTS, LINES, SILU_MUL)
    x_at = x_ptr + row_T.to(tl.int64)[:, None] * x_stride + columns_of(HALF, BITS)[None, :]
    acc_LT = tl.zeros((LINES, ROWS), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc_LT = packed_sums(
        acc_LT, code_ptr, scale_ptr, offset_ptr, table_ptr, x_at, tl.program_id(0) * OUTS, line_L,
        real_T, split * (STEPS * EACH), dtype, STEPS, DEPTH, BITS, FORM, GROUP, GROUP_ROWS,
        NUM_GROUPS, HAS_OFFSET, COLUMNS, EACH, STAGES, NUM_OUTS if SILU_MUL else 0, LINES,
        ALL_ROWS, UPCAST,
    )  # fmt: skip

    if SPLITS > 1:
        i_LT = tl.arange(0, LINES)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        num_tiles = tl.num_programs(0) * tl.num_programs(1)
        part_at = part_ptr + (tile * (LINES * ROWS) + i_LT)
        each = num_tiles * (LINES * ROWS)
        tl.store(part_at + split * each, acc_LT)
        # all threads store before the one thread's release; its acquire comes before all loads
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") != SPLITS - 1:
            return
        tl.store(arrived_ptr + tile, 0)
        acc_LT = tl.zeros((LINES, ROWS), tl.float32)
        for i in tl.static_range(SPLITS):
            # other multiprocessors wrote these, so .cg bypasses L1
            acc_LT += tl.load(part_at + i * each, cache_modifier=".cg")
    if HAS_BIAS:
        acc_LT += tl.load(bias_ptr + line_L).to(tl.float32)[:, None]
    y_TO = tl.trans(results_of(acc_LT, dtype, SILU_MUL))
    o_O = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    mask_TO = real_T[:, None] & (o_O < NUM_OUTS)[None, :]
    at_TO = row_T[:, None] * NUM_OUTS + o_O[None, :]
    if HAS_RESIDUAL:
        residual_TO = tl.load(residual_ptr + at_TO, mask=mask_TO, other=0.0)
        y_TO = (y_TO.to(tl.float32) + residual_TO.to(tl.float32)).to(dtype)
    tl.store(out_ptr + at_TO, y_TO, mask=mask_TO)


def gemm_constants(
    num_rows: int, num_outs: int, depth: int, codes: Codes, silu_mul: bool, tile: PackedGemmTile
) -> dict[str, Any]:
    """The kernel's constants that depend on the weight and the tile."""
    return codes.constants() | {
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "ROWS": tile.rows,
        "ALL_ROWS": num_rows % tile.rows == 0,
        "LINES": tile.lines,
        "COLUMNS": tile.columns,
        "EACH": tile.each,
        "SPLITS": tile.splits,
        "STAGES": tile.num_stages,
        "SILU_MUL": silu_mul,
    }


def packed_gemm(
    x_TD: Tensor,
    codes: Codes,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    silu_mul: bool,
    launch: PackedGemmTile | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """x · weightᵀ + bias, then silu(gate) · up, then + residual; see `reference.packed`.

    bf16 or fp16, last strides 1. `launch` and `pdl` override the tile and programmatic dependent
    launch, for measurements.
    """
    (num_rows, depth), device = x_TD.shape, x_TD.device
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    tile = launch or gemm_tile(num_rows, codes, depth, shared_memory_bytes(device))
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=device)
    outs = tile.lines // 2 if silu_mul else tile.lines
    grid = (triton.cdiv(num_outs, outs), triton.cdiv(num_rows, tile.rows), tile.splits)
    part, arrived = out_TO, out_TO
    if tile.splits > 1:
        size = tile.splits * grid[0] * grid[1] * tile.lines * tile.rows
        part = torch.empty(size, dtype=torch.float32, device=device)
        arrived = arrival_counters(device, grid[0] * grid[1])
    packed_gemm_kernel[grid](
        x_TD,
        codes.code,
        *codes.tensors(),
        x_TD if bias_O is None else bias_O,
        x_TD if residual_TO is None else residual_TO,
        out_TO,
        part,
        arrived,
        x_TD.stride(0),
        num_rows,
        **gemm_constants(num_rows, num_outs, depth, codes, silu_mul, tile),
        HAS_BIAS=bias_O is not None,
        HAS_RESIDUAL=residual_TO is not None,
        UPCAST=device.type != "cuda",
        num_warps=tile.num_warps,
        **(launch_options(device) if pdl is not False else {"PDL": False}),
    )
    return out_TO
