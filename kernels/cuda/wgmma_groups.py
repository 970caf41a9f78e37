"""Experts of many tokens with packed weights, by packed_wgmma.cu on sm_90: pairs sorted by expert.

Shapes: P pairs of a token and an expert | D depth | O weight rows | E experts | K experts per token
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.cuda import nvrtc, packed_linear, packed_wgmma, tensor_map
from nanovllm.kernels.cuda.nvrtc import Launch
from nanovllm.kernels.cuda.packed_wgmma import CHUNK
from nanovllm.kernels.triton.common import launch_options
from nanovllm.kernels.triton.moe_sort import Groups
from nanovllm.kernels.triton.packed_codes import Codes

ROWS = (16, 32, 48, 64, 128)  # pairs of a program


class Tile(NamedTuple):
    """The sizes of a program: pairs, weight rows in units of 64, chunks on their way."""

    rows: int
    groups: int
    num_stages: int


# By the mean number of pairs of an expert, the fastest of some for gpt-oss-20b in e2m1 and
# Qwen3-30B-A3B in int4 on an H100 (docs/log.md). The tiles of most experts are not full.
TILES = ((10, Tile(16, 1, 4)), (20, Tile(32, 1, 3)), (38, Tile(48, 2, 4)), (96, Tile(64, 2, 3)))
LARGE = Tile(128, 3, 3)


def tile_of(pairs_each: float) -> Tile:
    return next((tile for most, tile in TILES if pairs_each <= most), LARGE)


def takes(x_PD: Tensor, codes: Codes) -> bool:
    """True if the kernel can multiply pairs of the dtype of x with the experts: integers of 4 or 8
    bits or e2m1, and x in bf16."""
    return (
        packed_wgmma.is_supported(x_PD.device)
        and packed_linear.takes(x_PD, codes)
        and not codes.is_fp8
        and codes.code.dim() == 3
        and codes.code.is_contiguous()
        and x_PD.shape[1] % 32 == 0
        and codes.group >= 32
    )


def wgmma_groups(
    x_PD: Tensor,
    codes: Codes,
    groups: Groups,
    *,
    tile: Tile | None = None,
    by_place: bool = False,
    silu_mul: bool = False,
    factor_TK: Tensor | None = None,
    bias_EO: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """(x · weightᵀ + bias) · factor of the expert of each pair [P, O]. Rows of x are in the order
    of sorted pairs, and so are those of the result, if `by_place`. `tile` overrides the sizes.
    `takes` is true.

    With `clamp`, (alpha, limit), `silu_mul` is `reference.norm_act.clamped_swiglu`.
    """
    num_pairs, depth, num_experts = len(groups.pair_P), x_PD.shape[1], len(codes.code)
    tile = tile or tile_of(groups.pairs_each)
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    out_PO = torch.empty((num_pairs, num_outs), dtype=x_PD.dtype, device=x_PD.device)
    sizes, x_PD = packed_wgmma.Tile(tile.groups, 1, tile.num_stages), packed_linear.aligned(x_PD)
    lines = 64 * tile.groups // (2 if silu_mul else 1)  # of a box
    line_tiles, overlaps = -(-num_outs // lines), launch_options(x_PD.device)["PDL"]
    # as packed_wgmma.cu counts them: each expert has at most one more than its pairs fill
    grid = (line_tiles * (num_pairs // tile.rows + num_experts), 1, 1)
    shared_bytes = packed_wgmma.shared_bytes(sizes, tile.rows, codes.bits)
    how = Launch(grid, 128 * tile.groups + 32, shared_bytes, overlaps)

    def arguments() -> bytes:
        x_map = tensor_map.encode(x_PD, (tile.rows, CHUNK // 2))
        code_map = tensor_map.encode(codes.code.flatten(0, 1), (lines, CHUNK * codes.bits // 8))
        tensors = (
            codes.scale, codes.offset, bias_EO, None, groups.pair_P, groups.start_E1, factor_TK,
            out_PO,
        )  # fmt: skip
        return packed_wgmma.arguments_of(
            x_map + code_map, tensors, codes, num_pairs, depth, line_tiles, clamp or (0.0, 0.0)
        )

    function = packed_wgmma.function_of(
        x_PD, codes, sizes, tile.rows, SILU=silu_mul, CLAMP=clamp is not None, EXPERTS=1,
        OUT_BY_PLACE=by_place,
    )  # fmt: skip
    nvrtc.launch(function, how, arguments, x_PD.device)
    return out_PO
