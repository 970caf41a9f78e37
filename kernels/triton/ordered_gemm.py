"""Products of deterministic engines in Triton: the sums of an output have one order for any rows.

x · weightᵀ + bias (→ SiLU·up) (+ residual). The weights are the left operand of the
matrix units, which take it in pieces of 64 lines, and the rows of x are the right one, in tiles of
16 to 256 (for 8 Triton takes another instruction). So one row and thousands use the same
instruction, and an output is a chain of them along the depth. Where a weight has few lines, the
depth is cut into shares by `order.shares_of`, whose sums are added in ascending order: by one
program in turn, or by the last of several to arrive, as suits the number of rows. Tiles may follow
the rows: they change neither chains nor shares. With many rows and one share the library's product
is taken where it has the same bits (`ordered_library.py`).

Shapes: T rows | L lines of weights of one program, of gate and up if GATED | C columns of a chunk
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import order
from nanovllm.kernels.triton import gated_gemm, ordered_library
from nanovllm.kernels.triton.common import (
    arrival_counters,
    dot,
    finish,
    launch_options,
    num_multiprocessors,
    prefetch_and_wait,
    shared_memory_bytes,
)
from nanovllm.kernels.triton.ordered_library import Product


class OrderedTile(NamedTuple):
    """The sizes of a launch: rows and lines of one program, columns of a chunk, chunks in flight,
    warps; whether each share has a program, and whether weights are prefetched into the L2."""

    rows: int
    lines: int
    columns: int
    num_stages: int
    num_warps: int
    splits: bool = False
    prefetch: bool = False


@triton.jit
def _load(at, chunk, d_C, real_L, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr):
    """Columns of one chunk of lines that begin at `at`; zeros past the depth and, unless ALL, for
    lines that are not real."""
    if DEPTH % COLUMNS == 0 and ALL:
        return tl.load(at + chunk * COLUMNS)
    elif DEPTH % COLUMNS == 0:
        return tl.load(at + chunk * COLUMNS, mask=real_L[:, None], other=0.0)
    else:
        mask_LC = (chunk * COLUMNS + d_C < DEPTH)[None, :]
        if not ALL:
            mask_LC = real_L[:, None] & mask_LC
        return tl.load(at + chunk * COLUMNS, mask=mask_LC, other=0.0)


@triton.jit
def _sums(
    x_at, w_at, d_C, real_T, all_L, begin, end, DEPTH: tl.constexpr, EACH: tl.constexpr,
    ADDS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, ALL_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The sums [L, T] of chunks begin … end − 1: one chain or, if it ADDS shares, one for each
    EACH chunks, added in their order."""
    acc_LT = tl.zeros((all_L.shape[0], real_T.shape[0]), tl.float32)
    total_LT = acc_LT
    for chunk in tl.range(begin, end, num_stages=STAGES):
        x_TC = _load(x_at, chunk, d_C, real_T, DEPTH, COLUMNS, ALL_ROWS)
        w_LC = _load(w_at, chunk, d_C, all_L, DEPTH, COLUMNS, True)
        acc_LT = dot(w_LC, tl.trans(x_TC), acc_LT, UPCAST)
        if ADDS:  # noqa: SIM102  (Triton has no `and` of a constant and a value)
            if ((chunk + 1) % EACH == 0) | (chunk + 1 == end):
                total_LT += acc_LT
                acc_LT = tl.zeros((all_L.shape[0], real_T.shape[0]), tl.float32)
    return total_LT if ADDS else acc_LT


@triton.jit
def _sum_of_shares(part_at, each, real_T, LINES: tl.constexpr, ROWS: tl.constexpr,
                   SHARES: tl.constexpr):  # fmt: skip
    """The sums of the partial results of all shares, in their order."""
    acc_LT = tl.zeros((LINES, ROWS), tl.float32)
    for i in tl.static_range(SHARES):
        # other multiprocessors wrote these, so .cg bypasses L1
        acc_LT += tl.load(part_at + i * each, mask=real_T[None, :], other=0.0, cache_modifier=".cg")
    return acc_LT


@triton.jit
def _finished(acc_LT, dtype: tl.constexpr, GATED: tl.constexpr):
    """The outputs [T, O] of sums [L, T]; with GATED these are of 8 lines of gate, of the same 8 of
    up, and so on."""
    LINES: tl.constexpr = acc_LT.shape[0]
    ROWS: tl.constexpr = acc_LT.shape[1]
    if GATED:
        pairs = tl.permute(tl.reshape(acc_LT, (LINES // 16, 2, 8, ROWS)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        return tl.trans(tl.reshape(finish(gate, up, dtype, True), (LINES // 2, ROWS)))
    else:
        return tl.trans(acc_LT.to(dtype))


@triton.jit(do_not_specialize=["num_rows"])
def ordered_gemm_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [lines, D]
    bias_ptr,  # [lines], read if HAS_BIAS
    residual_ptr,  # [T, NUM_OUTS], read if HAS_RESIDUAL
    out_ptr,  # [T, NUM_OUTS], written
    part_ptr,  # [SHARES, T, lines] fp32, written if SPLITS
    arrived_ptr,  # [programs of one share] int32: zero before and after each launch
    x_stride,
    weight_stride,
    num_rows,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SHARE: tl.constexpr,
    SHARES: tl.constexpr,
    ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    LINES_P: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    OUTS: tl.constexpr = LINES // 2 if GATED else LINES
    NUM_LINES: tl.constexpr = 2 * NUM_OUTS if GATED else NUM_OUTS
    CHUNKS: tl.constexpr = (DEPTH + COLUMNS - 1) // COLUMNS
    EACH: tl.constexpr = SHARE // COLUMNS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    out = tl.program_id(0) * OUTS
    i_L = tl.arange(0, LINES)
    # outputs past the last recompute the last and are not stored
    if GATED:
        line_L = tl.minimum(out + i_L // 16 * 8 + i_L % 8, NUM_OUTS - 1) + i_L // 8 % 2 * NUM_OUTS
    else:
        line_L = tl.minimum(out + i_L, NUM_OUTS - 1)
    row_T = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real_T = row_T < num_rows
    d_C = tl.arange(0, COLUMNS)
    share = tl.program_id(2) if SPLITS else 0
    w_L = weight_ptr + line_L.to(tl.int64) * weight_stride
    w_at = w_L[:, None] + d_C[None, :]
    x_at = x_ptr + row_T.to(tl.int64)[:, None] * x_stride + d_C[None, :]
    prefetch_and_wait(w_L + share * SHARE, 0, 0, SHARE if SPLITS else DEPTH, LINES_P, False, PDL)

    begin, end = 0, CHUNKS
    if SPLITS:
        begin, end = share * EACH, tl.minimum(share * EACH + EACH, CHUNKS)
    acc_LT = _sums(
        x_at, w_at, d_C, real_T, line_L >= 0, begin, end, DEPTH, EACH, SHARES > 1 and not SPLITS,
        COLUMNS, STAGES, ALL_ROWS, UPCAST,
    )  # fmt: skip
    if SPLITS:
        each = num_rows.to(tl.int64) * NUM_LINES
        part_at = part_ptr + row_T.to(tl.int64)[None, :] * NUM_LINES + line_L[:, None]
        tl.store(part_at + share * each, acc_LT, mask=real_T[None, :])
        # all threads store before the one thread's release; its acquire comes before all loads
        tl.debug_barrier()
        arrived_at = arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu") != SHARES - 1:
            return
        tl.store(arrived_at, 0)
        acc_LT = _sum_of_shares(part_at, each, real_T, LINES, ROWS, SHARES)
    if HAS_BIAS:
        acc_LT += tl.load(bias_ptr + line_L).to(tl.float32)[:, None]
    o_O = out + tl.arange(0, OUTS)
    y_TO = _finished(acc_LT, dtype, GATED)
    mask_TO = real_T[:, None] & (o_O < NUM_OUTS)[None, :]
    at_TO = row_T.to(tl.int64)[:, None] * NUM_OUTS + o_O[None, :]
    if HAS_RESIDUAL:
        residual_TO = tl.load(residual_ptr + at_TO, mask=mask_TO, other=0.0)
        y_TO = (y_TO.to(tl.float32) + residual_TO.to(tl.float32)).to(dtype)
    tl.store(out_ptr + at_TO, y_TO, mask=mask_TO)


# Up to 16 rows, the fastest of seven for Qwen3-0.6B and 8B on an H100: prefetches and more stages
# make weights of up to SMALL numbers faster, and larger ones slower.
SMALL = (1 << 24) - 1
FEW_OF_SMALL = OrderedTile(16, 64, 128, 6, 4, splits=True, prefetch=True)
# Up to so many rows → the tile, with programs for shares if there are several.
FEW_ROWS = {
    16: OrderedTile(16, 64, 128, 4, 4, splits=True),
    32: OrderedTile(32, 64, 128, 4, 4, splits=True),
    64: OrderedTile(64, 64, 64, 5, 4, splits=True),
    256: OrderedTile(64, 64, 128, 4, 4),
}
# Tiles for more rows, and what a multiprocessor does in a cycle, about: bytes that it loads alone,
# and while all others load, products of numbers, and the cycles that a program takes besides.
MANY_ROWS = (
    OrderedTile(32, 64, 128, 4, 4), OrderedTile(64, 64, 128, 3, 4), OrderedTile(64, 128, 64, 4, 4),
    OrderedTile(128, 64, 64, 4, 4), OrderedTile(128, 128, 64, 4, 8),
    OrderedTile(256, 128, 64, 4, 8),
)  # fmt: skip
BYTES_ALONE, BYTES_TOGETHER, PRODUCTS_A_CYCLE, OTHER_CYCLES = 56, 40, 1200, 2000


def ordered_tile(
    num_rows: int, num_lines: int, depth: int, shared_bytes: int, multiprocessors: int
) -> OrderedTile:
    """The tile for so many rows, by an estimate if they are many: none changes the order of sums.

    With less shared memory it has fewer stages.
    """
    shares = order.shares_of(num_lines, depth).number
    few = next((tile for most, tile in FEW_ROWS.items() if num_rows <= most), None)
    if num_rows <= 16 and num_lines * depth <= SMALL:
        few = FEW_OF_SMALL

    def cycles(tile: OrderedTile) -> float:
        programs = triton.cdiv(num_lines, tile.lines) * triton.cdiv(num_rows, tile.rows)
        num_bytes = depth * (tile.rows + tile.lines) * 2
        products = depth * tile.rows * tile.lines
        each = max(num_bytes / BYTES_ALONE, products / PRODUCTS_A_CYCLE) + OTHER_CYCLES
        rounds = triton.cdiv(programs, multiprocessors)
        return max(rounds * each, programs * num_bytes / (multiprocessors * BYTES_TOGETHER))

    # two sets of sums of the largest tile do not fit the registers
    many = MANY_ROWS if shares == 1 else MANY_ROWS[:-1]
    tile = few if few is not None and (num_rows <= 32 or shares > 1) else min(many, key=cycles)
    stage_bytes = (tile.rows + tile.lines) * tile.columns * 2
    num_stages = max(2, min(tile.num_stages, (shared_bytes - 2048) // stage_bytes))
    return tile._replace(num_stages=num_stages, splits=tile.splits and shares > 1)


def ordered_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
    silu_mul: bool = False,
    launch: OrderedTile | None = None,
) -> Tensor:
    """`reference.ordered.ordered_linear` for bf16 and fp16, last strides 1.

    Weights may be prefetched before earlier kernels end. Raises ValueError for what it does not
    take. `launch` overrides the tile, for tests and measurements.
    """
    dtype = x_TD.dtype
    if x_TD.dim() != 2 or dtype not in (torch.bfloat16, torch.float16) or weight_OD.dtype != dtype:
        raise ValueError(
            f"ordered_linear takes two dimensions of bf16 or fp16, not {list(x_TD.shape)} of "
            f"{dtype} and weights of {weight_OD.dtype}"
        )
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    residual_TO = None if residual_TO is None else residual_TO.contiguous()
    num_lines, depth = weight_OD.shape
    if not x_TD.numel():
        return x_TD.new_empty((x_TD.shape[0], num_lines // (1 + silu_mul)))
    product = Product(x_TD, weight_OD, bias_O, residual_TO, silu_mul)
    shares = order.shares_of(num_lines, depth)
    if launch is None and shares.number == 1:
        if silu_mul and gated_gemm.takes(x_TD, weight_OD):  # weights on the left too, and one chain
            return gated_gemm.gated_gemm(x_TD, weight_OD, bias_O)
        if ordered_library.takes(product):
            return ordered_library.fastest(product, _by_tile)
    return _by_tile(product, launch)


def _by_tile(product: Product, launch: OrderedTile | None = None) -> Tensor:
    x_TD, weight_OD, bias_O, residual_TO, silu_mul = product
    device, shares = x_TD.device, order.shares_of(*weight_OD.shape)
    (num_rows, depth), num_lines = x_TD.shape, weight_OD.shape[0]
    num_outs = num_lines // 2 if silu_mul else num_lines
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=device)
    tile = launch or ordered_tile(
        num_rows, num_lines, depth, shared_memory_bytes(device), num_multiprocessors(device)
    )
    grid = (
        triton.cdiv(num_lines, tile.lines),
        triton.cdiv(num_rows, tile.rows),
        shares.number if tile.splits else 1,
    )
    part, arrived = out_TO, out_TO
    if tile.splits:
        numbers = shares.number * num_rows * num_lines
        part = torch.empty(numbers, dtype=torch.float32, device=device)
        arrived = arrival_counters(device, grid[0] * grid[1])
    ordered_gemm_kernel[grid](
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
        **ordered_constants(num_rows, num_lines, depth, silu_mul, tile),
        HAS_BIAS=bias_O is not None,
        HAS_RESIDUAL=residual_TO is not None,
        UPCAST=device.type != "cuda",
        num_warps=tile.num_warps,
        **launch_options(device),
    )
    return out_TO


def ordered_constants(
    num_rows: int, num_lines: int, depth: int, silu_mul: bool, tile: OrderedTile
) -> dict[str, Any]:
    """The kernel's compile-time constants that follow from sizes and the tile."""
    shares = order.shares_of(num_lines, depth)
    read = shares.columns if tile.splits else depth
    is_whole = shares.columns * shares.number == depth or not tile.splits
    return {
        "NUM_OUTS": num_lines // 2 if silu_mul else num_lines,
        "DEPTH": depth,
        "SHARE": shares.columns,
        "SHARES": shares.number,
        "ROWS": tile.rows,
        "ALL_ROWS": num_rows % tile.rows == 0,
        "LINES": tile.lines,
        "COLUMNS": tile.columns,
        "STAGES": tile.num_stages,
        "LINES_P": triton.next_power_of_2(max(1, read // 64))
        if tile.prefetch and is_whole and read % 64 == 0
        else 0,
        "SPLITS": tile.splits,
        "GATED": silu_mul,
    }
