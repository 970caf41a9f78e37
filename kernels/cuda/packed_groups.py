"""Experts of several tokens with packed weights, by packed_linear.cu: pairs sorted by expert.

Shapes: P pairs of a token and an expert | D depth | O weight rows | E experts | K experts per token
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nanovllm.kernels.cuda import nvrtc
from nanovllm.kernels.cuda.packed_linear import (
    Tile,
    aligned,
    arguments_of,
    function_of,
    launch_of,
    shared_bytes,
)
from nanovllm.kernels.triton.moe_sort import Groups
from nanovllm.kernels.triton.packed_codes import Codes

MOST_PAIRS = 4  # the mean number of pairs of an expert: other kernels are faster with more
FEW_CHUNKS = 8


def tile_of(codes: Codes) -> tuple[int, Tile]:
    """The pairs and the sizes of a program: the fastest of some for the experts of gpt-oss-20b and
    Qwen3-30B-A3B with 16 and 64 rows on an H100 (docs/log.md)."""
    num_chunks = codes.code.shape[-1] // 64
    return 8, Tile(4, 2 if num_chunks <= FEW_CHUNKS else 4, 1)


def packed_groups(
    x_PD: Tensor,
    codes: Codes,
    groups: Groups,
    *,
    tile: tuple[int, Tile] | None = None,
    x_shared_by: int | None = None,
    by_place: bool = False,
    silu_mul: bool = False,
    factor_TK: Tensor | None = None,
    bias_EO: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """(x · weightᵀ + bias) · factor of the expert of each pair [P, O].

    `x_shared_by` pairs share a row of x; without it rows of x are in the order of sorted pairs. So
    are those of the result, if `by_place`. `tile` overrides the pairs of a program, one of
    `packed_linear.ROWS`, and its sizes. With `clamp`, (alpha, limit), `silu_mul` is
    `reference.norm_act.clamped_swiglu`. `packed_linear.takes` is true.
    """
    (most_pairs, sizes), x_PD = tile or tile_of(codes), aligned(x_PD)
    num_pairs, num_experts = len(groups.pair_P), codes.code.shape[0]
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    out_PO = torch.empty((num_pairs, num_outs), dtype=x_PD.dtype, device=x_PD.device)
    function = function_of(
        x_PD, codes, sizes, most_pairs // 8, SILU=silu_mul, CLAMP=clamp is not None, PAIRS=3,
        X_BY_PLACE=x_shared_by is None, OUT_BY_PLACE=by_place,
    )  # fmt: skip
    outs = sizes.units * sizes.row_warps * (8 if silu_mul else 16)
    # as packed_linear.cu counts them: each expert has at most one more than its pairs fill
    grid = (-(-num_outs // outs), num_pairs // most_pairs + num_experts, 1)
    arguments = functools.partial(
        arguments_of, x_PD, codes, out_PO, bias=bias_EO, factor=factor_TK, pair=groups.pair_P,
        start=groups.start_E1, num_rows=num_experts, x_shared_by=x_shared_by or 1,
        clamp=clamp or (0.0, 0.0),
    )  # fmt: skip
    num_bytes = shared_bytes(sizes, most_pairs, codes, 0)
    nvrtc.launch(function, launch_of(grid, sizes, num_bytes, x_PD), arguments, x_PD.device)
    return out_PO
