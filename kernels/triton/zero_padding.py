"""Writes zeros to a bucket's padding tokens, which belong to no row.

Kernels of other packages leave them unwritten.

A program whose tokens all belong to rows reads two numbers and stops.

Shapes: T tokens | S starts of rows | W numbers of a token
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

TOKENS, TILE, NUM_WARPS = 64, 1024, 4


@triton.jit(do_not_specialize=["num_tokens", "last_start"])
def zero_padding_kernel(
    out_ptr,  # [T, W], written
    start_ptr,  # [S] int32
    num_tokens,
    last_start,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    begin = tl.load(start_ptr)
    end = tl.load(start_ptr + last_start)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    stop = tl.minimum(first + TOKENS, num_tokens)
    at_N = tl.arange(0, TILE)
    for token in range(first, stop):
        if (token < begin) | (token >= end):
            row_ptr = out_ptr + token * WIDTH
            for done in range(0, WIDTH, TILE):
                zero_N = tl.zeros([TILE], out_ptr.dtype.element_ty)
                tl.store(row_ptr + done + at_N, zero_N, mask=done + at_N < WIDTH)


def zero_padding_(out_TNH: Tensor, start_S: Tensor) -> None:
    """`reference.attention.zero_padding_`."""
    num_tokens, width = out_TNH.shape[0], out_TNH[:1].numel()
    zero_padding_kernel[(triton.cdiv(num_tokens, TOKENS),)](
        out_TNH,
        start_S,
        num_tokens,
        start_S.shape[0] - 1,
        WIDTH=width,
        TOKENS=TOKENS,
        TILE=TILE,
        num_warps=NUM_WARPS,
        **launch_options(out_TNH.device),
    )
