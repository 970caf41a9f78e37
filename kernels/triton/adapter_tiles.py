"""Tokens grouped by their adapters in one launch of one program.

The place of a token is the number of tokens with smaller adapters, and of earlier ones with the
same. Each is compared with all others, so the time grows with the square of the tokens.

Shapes: T tokens | B tokens at a time
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.reference.lora import tile_tokens
from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

# The most tokens of a launch; more are grouped by the reference. 0 until the kernel was timed on a
# GPU; 1024 is the most that its registers hold.
MAX_TOKENS = 0
BLOCK = 16
NONE = tl.constexpr(2**31 - 1)  # above all adapters


@triton.jit(do_not_specialize=["num_tokens"])
def adapter_tiles_kernel(
    adapter_ptr,  # [tokens]
    order_ptr,  # [tokens], written
    tile_ptr,  # [tokens, 3] int32, written
    num_tokens,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """`reference.lora.adapter_tiles`; SIZE is the most tokens of a tile."""
    wait_for_earlier_kernels(PDL)
    i_T = tl.arange(0, TOKENS)
    real_T = i_T < num_tokens
    own_T = tl.load(adapter_ptr + i_T, mask=real_T, other=NONE).to(tl.int32)
    smaller_T = tl.zeros((TOKENS,), tl.int32)
    earlier_T = tl.zeros((TOKENS,), tl.int32)
    same_T = tl.zeros((TOKENS,), tl.int32)
    for first in tl.range(0, num_tokens, BLOCK):
        j_B = first + tl.arange(0, BLOCK)
        other_B = tl.load(adapter_ptr + j_B, mask=j_B < num_tokens, other=NONE).to(tl.int32)
        is_same_TB = other_B[None, :] == own_T[:, None]
        smaller_T += tl.sum((other_B[None, :] < own_T[:, None]).to(tl.int32), 1)
        earlier_T += tl.sum((is_same_TB & (j_B[None, :] < i_T[:, None])).to(tl.int32), 1)
        same_T += tl.sum(is_same_TB.to(tl.int32), 1)
    place_T = smaller_T + earlier_T
    begins_T = earlier_T % SIZE == 0
    end_T = tl.where(begins_T, tl.minimum(place_T + SIZE, smaller_T + same_T), 0)
    tl.store(order_ptr + place_T, i_T.to(order_ptr.dtype.element_ty), mask=real_T)
    # tiles at their first tokens, then without what lies between
    tl.store(tile_ptr + place_T * 3 + 1, end_T, mask=real_T)
    tl.store(tile_ptr + place_T * 3 + 2, own_T, mask=real_T)
    tl.debug_barrier()
    end_T = tl.load(tile_ptr + i_T * 3 + 1, mask=real_T, other=0)
    own_T = tl.load(tile_ptr + i_T * 3 + 2, mask=real_T, other=0)
    is_tile_T = end_T > 0
    upto_T = tl.cumsum(is_tile_T.to(tl.int32), 0)
    num_tiles = tl.sum(is_tile_T.to(tl.int32))
    tl.debug_barrier()
    at_T = tile_ptr + (upto_T - 1) * 3
    tl.store(at_T, i_T, mask=is_tile_T)
    tl.store(at_T + 1, end_T, mask=is_tile_T)
    tl.store(at_T + 2, own_T, mask=is_tile_T)
    rest_T = real_T & (i_T >= num_tiles)
    zero_T = tl.zeros((TOKENS,), tl.int32)
    tl.store(tile_ptr + i_T * 3, zero_T, mask=rest_T)
    tl.store(tile_ptr + i_T * 3 + 1, zero_T, mask=rest_T)
    tl.store(tile_ptr + i_T * 3 + 2, zero_T, mask=rest_T)


def adapter_tiles(adapter_T: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.lora.adapter_tiles`."""
    num = adapter_T.shape[0]
    if not 0 < num <= MAX_TOKENS:
        return reference.lora.adapter_tiles(adapter_T)
    order_T = torch.empty_like(adapter_T)
    tile_T3 = adapter_T.new_empty((num, 3), dtype=torch.int32)
    tokens = max(BLOCK, triton.next_power_of_2(num))
    adapter_tiles_kernel[(1,)](
        adapter_T,
        order_T,
        tile_T3,
        num,
        TOKENS=tokens,
        BLOCK=BLOCK,
        SIZE=tile_tokens(num),
        num_warps=warps(tokens),
        **launch_options(adapter_T.device),
    )
    return order_T, tile_T3


def warps(tokens: int) -> int:
    """The warps of a program of so many tokens."""
    return 4 if tokens <= 256 else 16
