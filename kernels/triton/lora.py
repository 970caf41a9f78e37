"""LoRA in Triton: what the adapters of rows add to a product, in two launches.

The first computes the inner values of each token, the second multiplies them and adds the result
to the product in place. A program has some tokens, in an order in which those of an adapter follow
each other, and goes through their adapters, so each matrix is read by few programs. Programs whose
tokens have no adapter end at once, and tokens without one are neither read nor written.

Shapes: T tokens of a program | D columns at a time | O outputs of a program | L inner values of one
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton.common import (
    dot,
    launch_options,
    num_multiprocessors,
    wait_for_earlier_kernels,
)

TOKENS = 16  # of a program: the smallest tile of the matrix units
INNER = 64  # the most inner values of a program
COLUMNS = 128  # at a time
MIN_COLUMNS = 512  # of a program of the first launch
MAX_SPLITS = 16
MAX_PARTS = 8
MIN_OUTPUTS, MAX_OUTPUTS = 16, 128


@triton.jit
def _largest(number_T, below):
    """The largest of the adapters' numbers below one; 0 if there is none."""
    return tl.max(tl.where(number_T < below, number_T, 0), 0)


@triton.jit(do_not_specialize=["num_tokens"])
def lora_shrink_kernel(
    x_ptr,  # [tokens, DEPTH]
    adapter_ptr,  # [tokens], 0: none
    order_ptr,  # [tokens]
    a_ptr,  # [slots, NUM_INNER, DEPTH]
    z_ptr,  # [splits, tokens, NUM_INNER] fp32, written for tokens with adapters
    num_tokens,
    x_stride,
    NUM_INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT_DEPTH: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """z[split, t, l] = the part of a[adapter[t] − 1, l] · x[t] in the split's columns."""
    wait_for_earlier_kernels(PDL)
    i_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real_T = i_T < num_tokens
    token_T = tl.load(order_ptr + i_T, mask=real_T, other=0)
    number_T = tl.load(adapter_ptr + token_T, mask=real_T, other=0).to(tl.int32)
    l_L = tl.program_id(1) * INNER + tl.arange(0, INNER)
    first = tl.program_id(2) * SPLIT_DEPTH
    x_at = x_ptr + token_T.to(tl.int64)[:, None] * x_stride
    z_at = z_ptr + (tl.program_id(2) * num_tokens + token_T).to(tl.int64)[:, None] * NUM_INNER
    number = tl.max(number_T, 0)
    while number > 0:
        own_T = number_T == number
        a_at = a_ptr + ((number - 1).to(tl.int64) * NUM_INNER + l_L)[None, :] * DEPTH
        acc_TL = tl.zeros((TOKENS, INNER), tl.float32)
        for start in range(0, SPLIT_DEPTH, COLUMNS):
            d_D = first + start + tl.arange(0, COLUMNS)
            real_D = d_D < tl.minimum(DEPTH, first + SPLIT_DEPTH)
            x_TD = tl.load(x_at + d_D[None, :], mask=own_T[:, None] & real_D[None, :], other=0.0)
            mask_DL = real_D[:, None] & (l_L < NUM_INNER)[None, :]
            a_DL = tl.load(a_at + d_D[:, None], mask=mask_DL, other=0.0)
            acc_TL = dot(x_TD, a_DL, acc_TL, UPCAST)
        tl.store(z_at + l_L[None, :], acc_TL, mask=own_T[:, None] & (l_L < NUM_INNER)[None, :])
        number = _largest(number_T, number)


@triton.jit(do_not_specialize=["num_tokens"])
def lora_expand_kernel(
    y_ptr,  # [tokens, NUM_OUTPUTS], changed for tokens with adapters
    z_ptr,  # [SPLITS, tokens, NUM_INNER] fp32
    adapter_ptr,  # [tokens], 0: none
    order_ptr,  # [tokens]
    b_ptr,  # [slots, NUM_OUTPUTS, RANK]
    num_tokens,
    y_stride,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INNER: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    SPLITS: tl.constexpr,
    END_0: tl.constexpr,
    END_1: tl.constexpr,
    END_2: tl.constexpr,
    END_3: tl.constexpr,
    END_4: tl.constexpr,
    END_5: tl.constexpr,
    END_6: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t] += b[adapter[t] − 1] · z[t]; END_p is the first output after part p. A program's outputs
    are of one part."""
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    i_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real_T = i_T < num_tokens
    token_T = tl.load(order_ptr + i_T, mask=real_T, other=0)
    number_T = tl.load(adapter_ptr + token_T, mask=real_T, other=0).to(tl.int32)
    first = tl.program_id(1) * OUTPUTS
    part = (first >= END_0).to(tl.int32) + (first >= END_1) + (first >= END_2) + (first >= END_3)
    part += (first >= END_4).to(tl.int32) + (first >= END_5) + (first >= END_6)
    o_O, r_R = first + tl.arange(0, OUTPUTS), tl.arange(0, RANK_P)
    y_at = y_ptr + token_T.to(tl.int64)[:, None] * y_stride + o_O[None, :]
    number = tl.max(number_T, 0)
    if number > 0:
        z_at = z_ptr + token_T.to(tl.int64)[:, None] * NUM_INNER + (part * RANK + r_R)[None, :]
        mask_TR = (number_T > 0)[:, None] & (r_R < RANK)[None, :]
        z_TR = tl.zeros((TOKENS, RANK_P), tl.float32)
        for split in tl.static_range(SPLITS):
            at = z_at + num_tokens.to(tl.int64) * (split * NUM_INNER)
            z_TR += tl.load(at, mask=mask_TR, other=0.0)
        z_TR = z_TR.to(dtype)
        while number > 0:
            own_T = number_T == number
            b_at = b_ptr + ((number - 1).to(tl.int64) * NUM_OUTPUTS + o_O)[None, :] * RANK
            mask_RO = (r_R < RANK)[:, None] & (o_O < NUM_OUTPUTS)[None, :]
            b_RO = tl.load(b_at + r_R[:, None], mask=mask_RO, other=0.0)
            acc_TO = dot(z_TR, b_RO, tl.zeros((TOKENS, OUTPUTS), tl.float32), UPCAST)
            mask_TO = own_T[:, None] & (o_O < NUM_OUTPUTS)[None, :]
            y_TO = tl.load(y_at, mask=mask_TO, other=0.0).to(tl.float32) + acc_TO
            tl.store(y_at, y_TO.to(dtype), mask=mask_TO)
            number = _largest(number_T, number)


def num_outputs(rows: Sequence[int]) -> int:
    """The outputs of a program: no boundary between parts is within them."""
    return math.gcd(MAX_OUTPUTS, *rows)


def split_depth(num_tokens: int, num_inner: int, depth: int, num_processors: int) -> int:
    """The columns of a program of the first launch: few enough that there are programs for all
    multiprocessors, many enough to be worth a program."""
    num_tiles = triton.cdiv(num_tokens, TOKENS) * triton.cdiv(num_inner, inner_size(num_inner))
    wanted = max(1, min(MAX_SPLITS, num_processors // num_tiles))
    columns = max(MIN_COLUMNS, triton.cdiv(depth, wanted))
    return triton.cdiv(columns, COLUMNS) * COLUMNS


def inner_size(num_inner: int) -> int:
    """The inner values of a program."""
    return max(16, min(INNER, triton.next_power_of_2(num_inner)))


def shrink_constants(num_inner: int, depth: int, split: int) -> dict[str, int]:
    """The first kernel's compile-time constants."""
    return {
        "NUM_INNER": num_inner,
        "DEPTH": depth,
        "SPLIT_DEPTH": split,
        "TOKENS": TOKENS,
        "INNER": inner_size(num_inner),
        "COLUMNS": COLUMNS,
    }


def expand_constants(rows: Sequence[int], rank: int, num_splits: int) -> dict[str, int]:
    """The second kernel's compile-time constants."""
    total = sum(rows)
    ends = [sum(rows[: i + 1]) for i in range(len(rows))] + [total] * MAX_PARTS
    return {
        "NUM_OUTPUTS": total,
        "NUM_INNER": len(rows) * rank,
        "RANK": rank,
        "RANK_P": max(16, triton.next_power_of_2(rank)),
        "SPLITS": num_splits,
        **{f"END_{i}": ends[i] for i in range(MAX_PARTS - 1)},
        "TOKENS": TOKENS,
        "OUTPUTS": num_outputs(rows),
    }


def add_lora_(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    order_T: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: Sequence[int],
) -> None:
    """`reference.lora.add_lora_`."""
    outputs = num_outputs(rows)
    if (
        outputs < MIN_OUTPUTS
        or len(rows) > MAX_PARTS
        or not x_TD.dtype == y_TO.dtype == a_NLD.dtype
        or x_TD.stride(1) != 1
        or y_TO.stride(1) != 1
        or not (a_NLD.is_contiguous() and b_NOR.is_contiguous())
    ):
        reference.lora.add_lora_(y_TO, x_TD, adapter_T, order_T, a_NLD, b_NOR, list(rows))
        return
    (num_tokens, depth), num_inner, rank = x_TD.shape, a_NLD.shape[1], b_NOR.shape[2]
    if not num_tokens:
        return
    device, tiles = x_TD.device, triton.cdiv(num_tokens, TOKENS)
    split = split_depth(num_tokens, num_inner, depth, num_multiprocessors(device))
    num_splits = triton.cdiv(depth, split)
    options = {"UPCAST": device.type == "cpu", **launch_options(device)}
    z_STL = torch.empty((num_splits, num_tokens, num_inner), dtype=torch.float32, device=device)
    lora_shrink_kernel[(tiles, triton.cdiv(num_inner, inner_size(num_inner)), num_splits)](
        x_TD,
        adapter_T,
        order_T,
        a_NLD,
        z_STL,
        num_tokens,
        x_TD.stride(0),
        **shrink_constants(num_inner, depth, split),
        num_warps=4,
        **options,
    )
    lora_expand_kernel[(tiles, sum(rows) // outputs)](
        y_TO,
        z_STL,
        adapter_T,
        order_T,
        b_NOR,
        num_tokens,
        y_TO.stride(0),
        **expand_constants(rows, rank, num_splits),
        num_warps=4,
        **options,
    )


def add_lora(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    order_T: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: Sequence[int],
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`reference.lora.add_lora`, with a copy: the pass `lora_in_place` avoids it."""
    out_TO = y_TO.clone(memory_format=torch.contiguous_format)
    add_lora_(out_TO, x_TD, adapter_T, order_T, a_NLD, b_NOR, rows)
    return out_TO if residual_TO is None else out_TO + residual_TO
