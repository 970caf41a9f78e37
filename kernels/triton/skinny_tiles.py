"""Tiles of products with up to 16 rows, and for which shapes they beat cuBLAS."""

from __future__ import annotations

from typing import NamedTuple

MAX_ROWS = 16


class SkinnyTile(NamedTuple):
    """The sizes of a launch.

    Outputs of one program, slices and columns of a chunk of weights, chunks in flight, warps.

    `prefetch`: the chunks after those in flight are prefetched into the L2 before the wait. A
    single row has one slice.
    """

    outs: int
    slices: int
    columns: int
    ahead: int
    num_warps: int
    prefetch: bool = False


# (outputs, depth, silu·up): tiles for 1, for up to 8 and for up to 16 rows; None where
# split_k_gemm.py is faster. Measured on an H200 by scripts/bench/bench_linear.py.
TILES: dict[tuple[int, int, bool], tuple[SkinnyTile, SkinnyTile, SkinnyTile | None]] = {
    # Qwen3-0.6B: qkv, out, gate_up, down, head
    (4096, 1024, False): (
        SkinnyTile(8, 1, 256, 2, 4),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 256, 1, 4),
    ),
    (1024, 2048, False): (
        SkinnyTile(8, 1, 256, 8, 8),
        SkinnyTile(16, 4, 256, 2, 4),
        SkinnyTile(16, 4, 128, 4, 4),
    ),
    (3072, 1024, True): (
        SkinnyTile(8, 1, 256, 2, 4),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 256, 1, 4),
    ),
    (1024, 3072, False): (
        SkinnyTile(4, 1, 256, 12, 4),
        SkinnyTile(16, 8, 128, 2, 8, True),
        SkinnyTile(16, 4, 128, 4, 4, True),
    ),
    (151936, 1024, False): (
        SkinnyTile(4, 1, 256, 4, 2),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 256, 1, 4),
    ),
    # Qwen3-8B over two GPUs: out, gate_up; one row measured in a chain with sums over ranks
    (4096, 2048, False): (
        SkinnyTile(4, 1, 256, 8, 2),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 256, 1, 4),
    ),
    (6144, 4096, True): (
        SkinnyTile(4, 1, 256, 8, 4),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 256, 1, 4),
    ),
    # Qwen3-30B-A3B: qkv, out, head
    (5120, 2048, False): (SkinnyTile(8, 1, 256, 4, 4), SkinnyTile(16, 4, 256, 2, 4), None),
    (2048, 4096, False): (SkinnyTile(8, 1, 256, 16, 8), SkinnyTile(16, 8, 256, 2, 8), None),
    (151936, 2048, False): (
        SkinnyTile(8, 1, 256, 8, 4),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 256, 1, 4),
    ),
    # Qwen3-8B: qkv, out, gate_up, down, head
    (6144, 4096, False): (
        SkinnyTile(8, 1, 256, 4, 4),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 128, 4, 4),
    ),
    (4096, 4096, False): (
        SkinnyTile(8, 1, 256, 4, 4),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 128, 4, 4),
    ),
    (12288, 4096, True): (
        SkinnyTile(4, 1, 256, 2, 4),
        SkinnyTile(16, 4, 128, 1, 4),
        SkinnyTile(16, 4, 128, 1, 4),
    ),
    (4096, 12288, False): (
        SkinnyTile(16, 1, 256, 4, 8),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 128, 4, 4),
    ),
    (151936, 4096, False): (
        SkinnyTile(8, 1, 256, 2, 4),
        SkinnyTile(16, 4, 256, 1, 4),
        SkinnyTile(16, 4, 256, 1, 4),
    ),
}


def skinny_tile(num_rows: int, num_outs: int, depth: int, silu_mul: bool) -> SkinnyTile:
    """The measured tile; for other shapes the tile that was fast for most of these."""
    known = TILES.get((num_outs, depth, silu_mul))
    tile = known and known[0 if num_rows == 1 else 1 if num_rows <= 8 else 2]
    if tile:
        return tile
    if num_rows == 1:
        if num_outs <= 2048:
            return SkinnyTile(8, 1, 256, 8, 8)
        return (
            SkinnyTile(4, 1, 256, 2, 4) if depth < 4096 or silu_mul else SkinnyTile(8, 1, 256, 4, 4)
        )
    return SkinnyTile(16, 4, 256 if depth >= 1024 else 64, 1, 4)


def max_rows(num_outs: int, depth: int, has_norm: bool) -> int:
    """The most rows for which this beats cuBLAS with separate neighbours.

    Weights are [num_outs, depth].

    Every program norms all rows, which is slower than a norm kernel for long rows. cuBLAS also
    streams large weights for several rows, except with few outputs. Saving a norm launch allows one
    row more.
    """
    if has_norm and depth > 2048:
        return 1
    known = TILES.get((num_outs, depth, False))
    if known and known[2] is None and not has_norm:
        return 8
    if num_outs * depth <= 6144 * 1024:
        return MAX_ROWS
    if num_outs <= 4096:
        return MAX_ROWS if depth <= 4096 else 8
    return 2 if has_norm else 1
