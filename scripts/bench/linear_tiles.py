"""Shapes of the fused products of models, and the tiles to time for each shape."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from nanovllm.kernels.triton import gated_gemm, skinny_tiles, split_k_gemm
from nanovllm.kernels.triton.gated_gemm import GatedTile
from nanovllm.kernels.triton.skinny_tiles import SkinnyTile
from nanovllm.kernels.triton.split_k_gemm import SplitKTile
from nanovllm.tools.shapes import CONFIGS

Tile = SkinnyTile | GatedTile | SplitKTile
SHARED_BYTES = 227 << 10  # a block's shared memory on an H200


class Shape(NamedTuple):
    """A product: number of outputs, depth, RMS norm before it, silu · up after it."""

    num_outs: int
    depth: int
    norm: bool
    silu: bool


# Qwen3-8B's head without its norm, and the products of an EAGLE-3 head for it
DRAFTS = {
    "8b head bare": Shape(151936, 4096, False, False),
    "8b eagle3 qkv": Shape(6144, 8192, False, False),
    "8b eagle3 fc": Shape(4096, 12288, False, False),
}


def _products(name: str, model: str) -> dict[str, Shape]:
    config = CONFIGS[model]
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query = config["num_attention_heads"] * head_dim
    qkv = query + 2 * config["num_key_value_heads"] * head_dim
    return {
        f"{name} qkv": Shape(qkv, hidden, True, False),
        f"{name} out": Shape(hidden, query, False, False),
        f"{name} gate_up": Shape(ffn, hidden, True, True),
        f"{name} down": Shape(hidden, ffn, False, False),
        # with the norm in a separate kernel
        f"{name} qkv bare": Shape(qkv, hidden, False, False),
        f"{name} gate_up bare": Shape(ffn, hidden, False, True),
        f"{name} head": Shape(config["vocab_size"], hidden, True, False),
    }


MODELS = {"0.6b": "Qwen3-0.6B", "8b": "Qwen3-8B"}
SHAPES = (
    {
        name: shape
        for short, model in MODELS.items()
        for name, shape in _products(short, model).items()
    }
    | {
        "gpt-oss-20b qkv": Shape(5120, 2880, True, False),
        "Qwen3.5-35B-A3B qkv": Shape(9216, 2048, True, False),
        "Qwen3.5-35B-A3B channels": Shape(8192, 2048, True, False),
        "GLM-4.7-Flash out": Shape(2048, 5120, False, False),
        "GLM-4.7-Flash latents": Shape(1344, 2048, True, False),
    }
    | DRAFTS
)


def tiles(shape: Shape, num_rows: int, tune: bool) -> list[Tile]:
    """The tiles to time: the op's choice first, and with `tune` all candidates."""
    num_outs, depth, _, silu = shape
    if num_rows > skinny_tiles.MAX_ROWS:
        return _gemm_tiles(shape, num_rows, tune)
    found: list[Tile] = [skinny_tiles.skinny_tile(num_rows, num_outs, depth, silu)]
    if tune:
        found += _one_row_tiles(shape) if num_rows == 1 else _few_rows_tiles(shape)
        if num_rows > 1 and not shape.norm:  # kernels for more rows, which take few as well
            found += _gemm_tiles(shape, num_rows, False)
    return list(dict.fromkeys(found))


def _one_row_tiles(shape: Shape) -> list[Tile]:
    num_outs, depth, norm, silu = shape
    found: list[Tile] = []
    each_of = (1, 2, 4) if depth < 4096 else (1, 2)
    chunks = -(-depth // 256)
    for num_warps, each, ahead in product((4, 8), each_of, (2, 4, 8)):
        outs = each * num_warps
        registers = each * ahead * 4 * (1 + silu) + ahead * (12 if norm else 4)
        is_useful = ahead <= chunks or ahead == 4
        if registers <= 150 and is_useful and num_outs // outs >= 100:
            found.append(SkinnyTile(outs, 1, 256, ahead, num_warps))
            if ahead < chunks <= 12:
                found.append(SkinnyTile(outs, 1, 256, ahead, num_warps, True))
    return found


def _few_rows_tiles(shape: Shape) -> list[Tile]:
    num_outs, depth, _, silu = shape
    found: list[Tile] = []
    splits = ((4, 64), (4, 128), (4, 256), (8, 128))
    for outs, (slices, columns), ahead in product((16, 32), splits, (1, 2, 4)):
        chunk = slices * columns
        tile_bytes = outs * chunk * 2 * (1 + silu)
        fits = chunk * ahead <= depth and 8 << 10 <= tile_bytes <= (64 << 10) // ahead
        if fits and num_outs // outs >= 60:
            found.append(SkinnyTile(outs, slices, columns, ahead, slices))
            if chunk * ahead < depth < 4096:
                found.append(SkinnyTile(outs, slices, columns, ahead, slices, True))
    return found


def _gated_tiles(num_rows: int, num_outs: int, depth: int) -> list[Tile]:
    """The gated tiles for at least `num_rows` rows that divide the weight."""
    return [
        tile
        for rows, found in gated_gemm.TILES.items()
        if rows >= num_rows
        for tile in found
        if 2 * num_outs % (tile.first + tile.second) == 0 and depth % tile.columns == 0
    ]


def _gemm_tiles(shape: Shape, num_rows: int, tune: bool) -> list[Tile]:
    num_outs, depth, _, silu = shape
    found: list[Tile] = [split_k_gemm.split_k_tile(num_rows, num_outs, depth, silu, SHARED_BYTES)]
    if silu and num_outs * depth > split_k_gemm.SMALL_WEIGHT:
        found = _gated_tiles(num_rows, num_outs, depth) + found
    for rows, outs, columns, splits, stages in product(
        (32, 64, 128), (32, 64, 128, 256), (64, 128), (1, 2, 4), (3, 4, 6)
    ):
        programs = -(-num_rows // rows) * -(-num_outs // outs) * splits
        area, shared = rows * outs * (1 + silu), (rows + outs * (1 + silu)) * columns * 2 * stages
        if (
            tune
            and rows < 2 * num_rows
            and (rows <= 32 if num_rows <= 32 else rows >= 64)
            and (rows >= 128 or num_rows < 192 or num_outs < 2048)
            and 1024 <= area <= 32768
            and outs <= 2 * rows
            and depth % (columns * splits) == 0
            and depth // (columns * splits) >= stages
            and 48 <= programs <= 800
            and (splits == 1 or programs <= 280)
            and 72 << 10 <= shared <= 220 << 10
        ):
            found.append(SplitKTile(rows, outs, columns, splits, stages, 8 if area >= 16384 else 4))
    return list(dict.fromkeys(found))
