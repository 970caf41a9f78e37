"""The kernels of products with their production constants, for `builds.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

# name, kernel, constants, warps
Launch = tuple[str, Any, dict[str, Any], int]


class Product(NamedTuple):
    num_outs: int
    depth: int
    norm: bool
    silu_mul: bool
    everywhere: bool = False


PRODUCTS = (
    Product(4096, 1024, True, False), Product(1024, 2048, False, False, True),
    Product(3072, 1024, True, True, True), Product(1024, 3072, False, False),
    Product(12288, 4096, True, True), Product(4096, 12288, False, False),
    Product(1152, 896, True, False),  # of no measured model
)  # fmt: skip


def launches(shared_bytes: int, has_matrix_units: bool, whole: bool) -> Iterator[Launch]:
    for case, product in enumerate(PRODUCTS):
        if whole or product.everywhere:
            yield from _products(case, product, shared_bytes, has_matrix_units)
    if has_matrix_units:
        yield from _gated(shared_bytes, whole)


def _products(
    case: int, product: Product, shared_bytes: int, has_matrix_units: bool
) -> Iterator[Launch]:
    """For one row, a few and many rows: the kernel that `triton.linear` selects."""
    from nanovllm.kernels.triton import skinny_gemm, skinny_tiles, split_k_gemm

    num_outs, depth, norm, silu, _ = product
    for num_rows in (1, (2, 7, 16)[case % 3], (24, 64, 160)[case % 3]):
        weight = (2 * num_outs if silu else num_outs, depth)
        norm = norm and num_rows <= skinny_tiles.max_rows(*weight, True)
        label = f"linear {num_rows}x{num_outs}x{depth}"
        if num_rows > 1 and not has_matrix_units:
            continue
        if num_rows <= skinny_tiles.max_rows(*weight, norm):
            kernel, constants, num_warps = skinny_gemm.kernel_for(
                num_rows, num_outs, depth, norm, False, not silu, silu, False
            )
        elif num_rows <= split_k_gemm.max_rows(*weight):
            tile = split_k_gemm.split_k_tile(num_rows, num_outs, depth, silu, shared_bytes)
            kernel, num_warps = split_k_gemm.split_k_gemm_kernel, tile.num_warps
            constants = split_k_gemm.split_k_constants(
                num_rows, num_outs, depth, False, not silu, silu, tile
            )
            constants |= {"UPCAST": False}
        else:
            continue
        yield label, kernel, constants, num_warps


def _gated(shared_bytes: int, whole: bool) -> Iterator[Launch]:
    """gate_up of Qwen3-8B in every tile that fits the GPU, or in the first of them."""
    from nanovllm.kernels.triton import gated_gemm as gated

    num_outs, depth = 12288, 4096
    tiles = [(rows, tile) for rows, tiles in gated.TILES.items() for tile in tiles]
    fitting = [pair for pair in tiles if gated.shared_bytes_of(pair[1]) <= shared_bytes]
    for num_rows, tile in fitting if whole else fitting[:1]:
        constants = gated.gated_constants(num_rows - 1, num_outs, depth, True, tile) | {
            "UPCAST": False
        }
        label = f"gated {num_rows}x{num_outs}x{depth} {tuple(tile)}"
        yield label, gated.gated_gemm_kernel, constants, tile.num_warps
