"""Sums and gathers of small tensors over the GPUs of one host, through memory that all can read.

For decode steps NCCL's latency is most of the time of a sum. Here a rank writes its tensor to its
own region (`peers.py`), sets flags in the others' regions, waits for theirs, and reads their
tensors:

- one-shot: every rank reads and adds all tensors. The least latency.
- two-shot: every rank adds one part of all tensors, then reads the others' sums. Less to read from
  four ranks on.

Sums are in fp32, in the order of ranks, and rounded once, so all ranks get the same bits.

Why one wait per launch is enough: a program writes to a half of its slab that it used two launches
ago. Others may have read it then. They raise their flags of the next launch after that, and this
program has waited for these flags. Each program waits only for programs with its own index. Those
need only this rank's flags, which it raises before it waits. So no rank waits forever unless
another one has failed. Then `stop` of `Peers.table` ends the waits.

Launches of one rank must not run at the same time, so all are on one stream. All ranks launch the
same kernels in the same order.

N ranks | I elements of a program's tile | P elements of a part | R rows | D hidden
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import collectives, peers
from nanovllm.kernels.peers import Peers
from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.norm_act import add_rms_norm
from nanovllm.kernels.triton.peer_access import (
    counter_at,
    load_table,
    plus,
    pointer,
    raise_flags,
    slab_offset,
    wait_for_flags,
)

# The largest tensors, in bytes, that are added in one shot and in two, by the number of ranks; NCCL
# adds larger ones. Tensors of more than MAX_PROGRAMS · SLAB_BYTES (8 MiB) do not fit.
# With two ranks one shot and two read the same number of bytes. The numbers for two ranks are
# measured on H200s; those for four and eight are estimates.
ONE_SHOT_BYTES = {2: 8 << 20, 4: 512 << 10, 8: 256 << 10}
TWO_SHOT_BYTES = {2: 0, 4: 8 << 20, 8: 8 << 20}
# With more rows the sum and the norm are faster apart.
NORM_ROWS = 64
# The largest part of one rank that is gathered.
GATHER_BYTES = 4 << 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_VECTOR_BYTES = 16  # that a thread loads at once
_LEAST_BYTES = 4096  # of a tile: 8 warps with one load per thread and rank
_LEAST_PART_BYTES = 2048


@triton.jit
def sum_over_ranks(regions, offset, i_I, NUM_RANKS: tl.constexpr, dtype: tl.constexpr):
    """The sum, in fp32, of elements i_I of all ranks' data at `offset`, rounded to dtype."""
    # not from the first cache, which other GPUs' writes do not reach
    total_I = tl.load(pointer(regions[0] + offset, dtype) + i_I, cache_modifier=".cg").to(
        tl.float32
    )
    for rank in tl.static_range(1, NUM_RANKS):
        total_I += tl.load(pointer(regions[rank] + offset, dtype) + i_I, cache_modifier=".cg")
    return total_I.to(dtype)


@triton.jit
def one_shot_kernel(
    x_ptr,  # [num_elements]
    residual_ptr,  # [num_elements], read if HAS_RESIDUAL
    out_ptr,  # [num_elements], written; may be x
    peers_ptr,  # see `Peers.table`
    num_elements,
    NUM_RANKS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    regions, region_N, rank, own, stop_address = load_table(peers_ptr, NUM_RANKS)
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0)
    i_I = tl.arange(0, TILE)
    at_I = program * TILE + i_I
    mask_I = at_I < num_elements
    counter_ptr = counter_at(own, program)
    counter = tl.load(counter_ptr)
    offset = slab_offset(program, counter)
    x_I = tl.load(x_ptr + at_I, mask=mask_I, other=0.0)
    tl.store(pointer(own + offset, dtype) + i_I, x_I)
    raise_flags(region_N, rank, program, counter + 2)
    residual_I = x_I
    if HAS_RESIDUAL:
        residual_I = tl.load(residual_ptr + at_I, mask=mask_I, other=0.0)
    wait_for_flags(own, stop_address, program, counter + 2, NUM_RANKS)
    y_I = sum_over_ranks(regions, offset, i_I, NUM_RANKS, dtype)
    tl.store(out_ptr + at_I, plus(y_I, residual_I, HAS_RESIDUAL), mask=mask_I)
    tl.store(counter_ptr, counter + 2)


@triton.jit
def two_shot_kernel(
    x_ptr,  # [num_elements]
    residual_ptr,  # [num_elements], read if HAS_RESIDUAL
    out_ptr,  # [num_elements], written; may be x
    peers_ptr,  # see `Peers.table`
    num_elements,
    NUM_RANKS: tl.constexpr,
    PART: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    regions, region_N, rank, own, stop_address = load_table(peers_ptr, NUM_RANKS)
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    part_bytes: tl.constexpr = PART * (dtype.primitive_bitwidth // 8)
    program = tl.program_id(0)
    i_P = tl.arange(0, PART)
    at_P = program * (NUM_RANKS * PART) + i_P
    counter_ptr = counter_at(own, program)
    counter = tl.load(counter_ptr)
    offset = slab_offset(program, counter)
    for part in tl.static_range(NUM_RANKS):
        x_P = tl.load(x_ptr + at_P + part * PART, mask=at_P + part * PART < num_elements, other=0.0)
        tl.store(pointer(own + offset + part * part_bytes, dtype) + i_P, x_P)
    raise_flags(region_N, rank, program, counter + 1)
    wait_for_flags(own, stop_address, program, counter + 1, NUM_RANKS)
    # The sum takes the place of this rank's own numbers, which no other rank reads.
    own_part = offset + rank * part_bytes
    sum_P = sum_over_ranks(regions, own_part, i_P, NUM_RANKS, dtype)
    tl.store(pointer(own + own_part, dtype) + i_P, sum_P)
    raise_flags(region_N, rank, program, counter + 2)
    wait_for_flags(own, stop_address, program, counter + 2, NUM_RANKS)
    for part in tl.static_range(NUM_RANKS):
        mask_P = at_P + part * PART < num_elements
        y_P = tl.load(
            pointer(regions[part] + offset + part * part_bytes, dtype) + i_P, cache_modifier=".cg"
        )
        residual_P = y_P
        if HAS_RESIDUAL:
            residual_P = tl.load(residual_ptr + at_P + part * PART, mask=mask_P, other=0.0)
        tl.store(out_ptr + at_P + part * PART, plus(y_P, residual_P, HAS_RESIDUAL), mask=mask_P)
    tl.store(counter_ptr, counter + 2)


@triton.jit
def reduce_norm_kernel(
    x_ptr,  # [R, D]
    residual_ptr,  # [R, D]
    weight_ptr,  # [D]
    out_ptr,  # [R, D], written: the norm
    sum_ptr,  # [R, D], written: the sum over ranks + residual
    peers_ptr,  # see `Peers.table`
    eps,
    NUM_RANKS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes one row, and rounds where `one_shot_kernel` and `rms_norm_kernel` round."""
    regions, region_N, rank, own, stop_address = load_table(peers_ptr, NUM_RANKS)
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0)
    d_D = tl.arange(0, DIM_P)
    at_D = row * DIM + d_D
    mask_D = d_D < DIM
    counter_ptr = counter_at(own, row)
    counter = tl.load(counter_ptr)
    offset = slab_offset(row, counter)
    x_D = tl.load(x_ptr + at_D, mask=mask_D, other=0.0)
    tl.store(pointer(own + offset, dtype) + d_D, x_D)
    raise_flags(region_N, rank, row, counter + 2)
    residual_D = tl.load(residual_ptr + at_D, mask=mask_D, other=0.0)
    weight_D = tl.load(weight_ptr + d_D, mask=mask_D, other=0.0).to(tl.float32)
    wait_for_flags(own, stop_address, row, counter + 2, NUM_RANKS)
    y_D = plus(sum_over_ranks(regions, offset, d_D, NUM_RANKS, dtype), residual_D, True)
    tl.store(sum_ptr + at_D, y_D, mask=mask_D)
    y_D = y_D.to(tl.float32)
    factor = tl.rsqrt(tl.sum(y_D * y_D, 0) / DIM + eps)
    out_D = (y_D * factor).to(dtype).to(tl.float32) * weight_D
    tl.store(out_ptr + at_D, out_D.to(dtype), mask=mask_D)
    tl.store(counter_ptr, counter + 2)


@triton.jit
def gather_columns_kernel(
    x_ptr,  # [R, WIDTH]
    out_ptr,  # [R, NUM_COLUMNS], written
    peers_ptr,  # see `Peers.table`
    NUM_RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes a piece of a row of every rank."""
    regions, region_N, rank, own, stop_address = load_table(peers_ptr, NUM_RANKS)
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(1).to(tl.int64)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    i_I = tl.arange(0, TILE)
    column_I = tl.program_id(0) * TILE + i_I
    counter_ptr = counter_at(own, program)
    counter = tl.load(counter_ptr)
    offset = slab_offset(program, counter)
    x_I = tl.load(x_ptr + row * WIDTH + column_I, mask=column_I < WIDTH, other=0.0)
    tl.store(pointer(own + offset, dtype) + i_I, x_I)
    raise_flags(region_N, rank, program, counter + 2)
    wait_for_flags(own, stop_address, program, counter + 2, NUM_RANKS)
    for other in tl.static_range(NUM_RANKS):
        y_I = tl.load(pointer(regions[other] + offset, dtype) + i_I, cache_modifier=".cg")
        out_column_I = other * WIDTH + column_I
        mask_I = (column_I < WIDTH) & (out_column_I < NUM_COLUMNS)
        tl.store(out_ptr + row * NUM_COLUMNS + out_column_I, y_I, mask=mask_I)
    tl.store(counter_ptr, counter + 2)


BY_FORM = {"one-shot": one_shot_kernel, "two-shot": two_shot_kernel}


class Tile(NamedTuple):
    """How a tensor is divided: elements of a program (of its part if in two shots), and warps."""

    form: Literal["one-shot", "two-shot"]
    size: int
    num_warps: int


def warps_for(num_bytes: int) -> int:
    """Warps whose threads load so many bytes, one vector each, within bounds."""
    return max(4, min(16, num_bytes // (_VECTOR_BYTES * 32)))


def one_shot_tile(num_bytes: int, element_size: int) -> Tile | None:
    """None if the tensor is too large."""
    each = max(_LEAST_BYTES, triton.next_power_of_2(triton.cdiv(num_bytes, peers.MAX_PROGRAMS)))
    if each > peers.SLAB_BYTES:
        return None
    return Tile("one-shot", each // element_size, warps_for(each))


def two_shot_tile(num_bytes: int, element_size: int, num_ranks: int) -> Tile | None:
    """None if the tensor is too large."""
    share = triton.cdiv(num_bytes, peers.MAX_PROGRAMS * num_ranks)
    part = max(_LEAST_PART_BYTES, triton.next_power_of_2(share))
    if part * num_ranks > peers.SLAB_BYTES:
        return None
    return Tile("two-shot", part // element_size, warps_for(part))


def tile_for(num_bytes: int, element_size: int, num_ranks: int) -> Tile | None:
    """The fastest form for a sum of tensors of so many bytes; None if NCCL is faster."""
    if num_bytes <= ONE_SHOT_BYTES[num_ranks]:
        return one_shot_tile(num_bytes, element_size)
    if num_bytes <= TWO_SHOT_BYTES[num_ranks]:
        return two_shot_tile(num_bytes, element_size, num_ranks)
    return None


def gather_tile(num_rows: int, width: int, element_size: int) -> int | None:
    """Columns of a program that gathers `width` columns of each rank; None if NCCL should."""
    if num_rows > peers.MAX_PROGRAMS or num_rows * width * element_size > GATHER_BYTES:
        return None
    least = triton.cdiv(width, peers.MAX_PROGRAMS // num_rows)
    tile = max(_LEAST_BYTES // element_size, triton.next_power_of_2(least))
    return tile if tile * element_size <= peers.SLAB_BYTES else None


def reduce_by(
    tile: Tile, x: Tensor, residual: Tensor | None, out: Tensor, regions: Peers
) -> Tensor:
    """out = the sum of x over the ranks, plus the residual; all are contiguous. `out` may be x."""
    is_two_shot = tile.form == "two-shot"
    whole = tile.size * regions.num_ranks if is_two_shot else tile.size
    size = {"PART" if is_two_shot else "TILE": tile.size}
    BY_FORM[tile.form][(triton.cdiv(x.numel(), whole),)](
        x,
        x if residual is None else residual,
        out,
        regions.table,
        x.numel(),
        NUM_RANKS=regions.num_ranks,
        HAS_RESIDUAL=residual is not None,
        num_warps=tile.num_warps,
        **size,
        **launch_options(x.device),
    )
    return out


def norm_by(
    x_RD: Tensor, residual_RD: Tensor, weight_D: Tensor, eps: float, regions: Peers
) -> tuple[Tensor, Tensor]:
    """(norm, sum): `collectives.all_reduce_norm` in one launch; all are contiguous."""
    out, total = torch.empty_like(x_RD), torch.empty_like(x_RD)
    dim = x_RD.shape[-1]
    dim_p = triton.next_power_of_2(dim)
    reduce_norm_kernel[(x_RD.numel() // dim,)](
        x_RD,
        residual_RD,
        weight_D,
        out,
        total,
        regions.table,
        eps,
        NUM_RANKS=regions.num_ranks,
        DIM=dim,
        DIM_P=dim_p,
        num_warps=warps_for(dim_p * x_RD.element_size()),
        **launch_options(x_RD.device),
    )
    return out, total


def _regions_for(x: Tensor) -> Peers | None:
    """The regions of the group in use, if it has some and the kernels take x's dtype."""
    return collectives.current().peers if x.dtype in DTYPES and x.numel() > 0 else None


def _tile_of(x: Tensor, regions: Peers) -> Tile | None:
    return tile_for(x.nbytes, x.element_size(), regions.num_ranks)


def all_reduce(x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`collectives.all_reduce`: small tensors through the regions, others by the group."""
    regions = _regions_for(x)
    tile = None if regions is None else _tile_of(x, regions)
    if regions is None or tile is None:
        return collectives.all_reduce(x, residual)
    x = x.contiguous()
    added = None if residual is None else residual.contiguous()
    return reduce_by(tile, x, added, torch.empty_like(x), regions)


def all_reduce_(x: Tensor, residual: Tensor | None = None) -> None:
    """`collectives.all_reduce_`: small tensors through the regions, others by the group."""
    regions = _regions_for(x)
    tile = None if regions is None else _tile_of(x, regions)
    if regions is None or tile is None:
        collectives.all_reduce_(x, residual)
    else:
        reduce_by(tile, x, None if residual is None else residual.contiguous(), x, regions)


def has_few_rows(x: Tensor) -> bool:
    """Whether `all_reduce_norm` may be one launch for some number of ranks."""
    return takes_norm(x.numel() // x.shape[-1], x.shape[-1], x.element_size(), 2)


def takes_norm(num_rows: int, dim: int, element_size: int, num_ranks: int) -> bool:
    """Whether one launch should do `all_reduce_norm`."""
    row_bytes = triton.next_power_of_2(dim) * element_size
    return (
        num_rows <= NORM_ROWS
        and row_bytes <= peers.SLAB_BYTES
        and num_rows * dim * element_size <= ONE_SHOT_BYTES[num_ranks]
    )


def all_reduce_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`collectives.all_reduce_norm`: one launch for few rows, else a sum and then a norm."""
    regions, dim = _regions_for(x), x.shape[-1]
    if regions is not None and takes_norm(
        x.numel() // dim, dim, x.element_size(), regions.num_ranks
    ):
        return norm_by(x.contiguous(), residual.contiguous(), weight_D, eps, regions)
    return add_rms_norm(all_reduce(x), residual, weight_D, eps)


def gather_columns(x_RW: Tensor, num_columns: int) -> Tensor:
    """`collectives.gather_columns`: small tensors through the regions, others by the group."""
    regions = _regions_for(x_RW)
    num_rows, width = x_RW.shape
    tile = None if regions is None else gather_tile(num_rows, width, x_RW.element_size())
    if regions is None or tile is None:
        return collectives.gather_columns(x_RW, num_columns)
    out = x_RW.new_empty(num_rows, num_columns)
    gather_columns_kernel[(triton.cdiv(width, tile), num_rows)](
        x_RW.contiguous(),
        out,
        regions.table,
        NUM_RANKS=regions.num_ranks,
        WIDTH=width,
        NUM_COLUMNS=num_columns,
        TILE=tile,
        num_warps=warps_for(tile * x_RW.element_size()),
        **launch_options(x_RW.device),
    )
    return out
