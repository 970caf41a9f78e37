"""Tiles of products with packed weights, and up to how many rows they are used."""

from __future__ import annotations

from typing import NamedTuple

from nanovllm.kernels.triton.packed_codes import E2M1, Codes

MAX_ROWS = 64  # more rows are multiplied by cuBLAS


class PackedGemvTile(NamedTuple):
    """The sizes of a launch for one row: outputs of one program, warps, pieces of a thread, chunks
    that are loaded together."""

    outs: int
    num_warps: int
    each: int = 2
    ahead: int = 1


class PackedGemmTile(NamedTuple):
    """The sizes of a launch for some rows: rows and weight rows of a program, columns of a chunk,
    chunks of a step, parts of the depth, steps in flight, warps."""

    rows: int
    lines: int
    columns: int
    each: int
    splits: int
    num_stages: int
    num_warps: int


RUNGS = (8, 16, 32, 64)


def chunk_columns(codes: Codes, depth: int) -> int:
    """The most columns, up to 128, of a chunk with one scale, or with two for groups of 16. Numbers
    in e2m1 have chunks with two scales: the 16 bytes of a group are half of what memory moves."""
    least = 32 if codes.bits == 4 else 16
    if codes.form == E2M1.value and codes.group == 32 and codes.group_rows == 1 and depth % 64 == 0:
        return 64
    group = depth if codes.group >= depth else max(codes.group, least)
    return next(c for c in (128, 64, 32, 16) if group % c == 0 and depth % c == 0)


def gemv_tile(
    num_rows: int, codes: Codes, depth: int, silu_mul: bool, pairs: int, multiprocessors: int
) -> PackedGemvTile:
    """The tile for one row, of a weight or of `num_rows` pairs with their experts."""
    pieces = depth * codes.bits // 64
    num_warps = 1 if pieces <= 96 else 2 if pieces <= 192 else 4
    # a thread has the codes of 8 weight rows, or of 4 with a table, which takes registers
    outs = (4 if silu_mul else 8) // (2 if codes.reads_table else 1)
    each = 2 if pieces >= 64 else 1
    if codes.reads_table and pairs > 1:  # all pairs are unrolled: no value spills
        outs, num_warps = min(outs, 2), min(4, 2 * num_warps)
    if codes.form == E2M1.value:
        # The time is that of instructions, not of loads, also for lanes behind the end of a row.
        outs, step = min(outs, 4), 64 * num_warps
        each = each if -(-pieces // step) * step <= 1.2 * pieces else 1
    lines = num_rows * codes.num_rows // (1 + silu_mul)
    while outs > 1 and lines < 2 * outs * multiprocessors:
        outs //= 2
    return PackedGemvTile(outs, num_warps, each, 2 if pairs > 1 else 1)


def gemm_tile(num_rows: int, codes: Codes, depth: int, shared_bytes: int) -> PackedGemmTile:
    """The tile for some rows. The parts of the depth are the same for all numbers of rows."""
    rung = next((r for r in RUNGS if num_rows <= r), RUNGS[-1])
    columns = chunk_columns(codes, depth)
    each = next(n for n in (8, 4, 2, 1) if n * columns <= 128 and depth % (n * columns) == 0)
    # 2 programs on each of 132 multiprocessors, with 4 steps at least
    tiles, steps = -(-codes.num_rows // 64), depth // (columns * each)
    splits = next(
        n
        for n in (1, 2, 4, 8)
        if n == 8 or tiles * n >= 264 or steps % (2 * n) or steps // (2 * n) < 4
    )
    tile = PackedGemmTile(rung, 64, columns, each, splits, 4, 4)
    return fitted(tile, codes, depth, shared_bytes)


def fitted(tile: PackedGemmTile, codes: Codes, depth: int, shared_bytes: int) -> PackedGemmTile:
    """The tile with fewer steps in flight, or narrower chunks, if shared memory is small."""
    while (most := _most_stages(tile, codes, shared_bytes)) < 2:
        least = 32 if codes.bits == 4 else 16
        if tile.each > 1:
            tile = tile._replace(each=tile.each // 2)
        elif tile.columns > least:
            tile = tile._replace(columns=tile.columns // 2)
        elif tile.lines > 64:
            tile = tile._replace(lines=64)
        else:
            tile = tile._replace(rows=tile.rows // 2)
    return tile._replace(num_stages=min(tile.num_stages, most))


def _most_stages(tile: PackedGemmTile, codes: Codes, shared_bytes: int) -> int:
    """Steps that fit beside the operand that goes through shared memory once more."""
    columns = tile.columns * tile.each
    stage_bytes = tile.lines * columns * codes.bits // 8 + tile.rows * columns * 2
    operand_bytes = tile.lines * tile.columns * 2
    return (shared_bytes - 4096 - operand_bytes) // stage_bytes


# Pairs are sorted where more than a quarter as many pairs as experts make sharing likely.
PAIRS_PER_EXPERT = 0.25


def few_pairs(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """True if each pair of a token and one of its experts is multiplied by itself."""
    return num_tokens == 1 or num_tokens * top_k <= PAIRS_PER_EXPERT * num_experts


def grouped_tile(pairs_each: float, codes: Codes, depth: int, shared_bytes: int) -> PackedGemmTile:
    """The tile for experts with so many pairs each."""
    columns = chunk_columns(codes, depth)
    rows = next((rows for most, rows in ((8, 16), (24, 32), (96, 64)) if pairs_each <= most), 128)
    lines, num_warps = (64, 4) if rows < 64 else (128, 8)
    each = next(n for n in (8, 4, 2, 1) if n * columns <= 128 and depth % (n * columns) == 0)
    num_stages = 4
    if codes.form == E2M1.value and rows < 64 and columns * each < 128 and depth % 192 == 0:
        # Widths such as 2880 have no steps of 128 columns, and short steps take more instructions.
        each, num_stages = 192 // columns, 3
    tile = PackedGemmTile(rows, lines, columns, each, 1, num_stages, num_warps)
    return fitted(tile, codes, depth, shared_bytes)
