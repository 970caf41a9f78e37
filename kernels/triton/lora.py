"""LoRA in Triton: what the adapters of rows add to a product, in two launches.

The first computes the inner values of each token, the second multiplies them and adds the result
to the product in place, or goes on to SiLU · up. A program has some tokens, in an order in which
those of an adapter follow each other, and goes through their adapters, so each matrix is read by
few programs. Tokens without an adapter are neither read nor written, but by SiLU · up.
`lora_row.py` has kernels for one token.

Shapes: T tokens of a program | D columns at a time | O outputs of a program | L inner values of one
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton.common import (
    dot,
    finish,
    launch_options,
    num_multiprocessors,
    wait_for_earlier_kernels,
)

TOKENS = 16  # of a program: the smallest tile of the matrix units
# Of a program, of more than FEW tokens. With 64, Triton multiplies by warpgroups, which was wrong
# for operands of 16 (docs/log.md, gated delta rule).
MANY_TOKENS, FEW = 32, 512
INNER = 64  # the most inner values of a program
MIN_COLUMNS, MIN_COLUMNS_OF_MANY = 128, 512  # of a program of the first launch
MAX_SPLITS = 32
STAGE_BYTES = 20 * 1024
MATRIX_BYTES = 32 * 1024
MAX_PARTS = 8
MIN_OUTPUTS, MAX_OUTPUTS = 16, 256


@triton.jit
def _largest(number_T, below):
    """The largest of the adapters' numbers below one; 0 if there is none."""
    return tl.max(tl.where(number_T < below, number_T, 0), 0)


@triton.jit
def part_of(
    output, END_0: tl.constexpr, END_1: tl.constexpr, END_2: tl.constexpr, END_3: tl.constexpr,
    END_4: tl.constexpr, END_5: tl.constexpr, END_6: tl.constexpr,
):  # fmt: skip
    """The part of outputs; END_p is the first output after part p."""
    part = (output >= END_0).to(tl.int32) + (output >= END_1) + (output >= END_2)
    part += (output >= END_3).to(tl.int32) + (output >= END_4) + (output >= END_5)
    return part + (output >= END_6)


@triton.jit(do_not_specialize=["num_tokens"])
def lora_shrink_kernel(
    x_ptr,  # [tokens, DEPTH]
    sorted_ptr,  # [tokens], adapters in their order; 0: none
    order_ptr,  # [tokens]
    a_ptr,  # [slots, NUM_INNER, DEPTH]
    z_ptr,  # [splits, tokens, NUM_INNER] fp32, in that order, written for tokens with adapters
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
    number_T = tl.load(sorted_ptr + i_T, mask=real_T, other=0).to(tl.int32)
    l_L = tl.program_id(1) * INNER + tl.arange(0, INNER)
    first = tl.program_id(2) * SPLIT_DEPTH
    x_at = x_ptr + token_T.to(tl.int64)[:, None] * x_stride
    number = tl.max(number_T, 0)
    acc_TL = tl.zeros((TOKENS, INNER), tl.float32)
    while number > 0:
        own_T = number_T == number
        a_at = a_ptr + ((number - 1).to(tl.int64) * NUM_INNER + l_L)[None, :] * DEPTH
        for start in range(0, SPLIT_DEPTH, COLUMNS):
            d_D = first + start + tl.arange(0, COLUMNS)
            real_D = d_D < tl.minimum(DEPTH, first + SPLIT_DEPTH)
            x_TD = tl.load(x_at + d_D[None, :], mask=own_T[:, None] & real_D[None, :], other=0.0)
            mask_DL = real_D[:, None] & (l_L < NUM_INNER)[None, :]
            a_DL = tl.load(a_at + d_D[:, None], mask=mask_DL, other=0.0)
            acc_TL = dot(x_TD, a_DL, acc_TL, UPCAST)
        number = _largest(number_T, number)
    z_at = z_ptr + (tl.program_id(2) * num_tokens + i_T).to(tl.int64)[:, None] * NUM_INNER
    mask_TL = (number_T > 0)[:, None] & (l_L < NUM_INNER)[None, :]
    tl.store(z_at + l_L[None, :], acc_TL, mask=mask_TL)


@triton.jit
def _inner_values(
    z_ptr, i_T, number_T, num_tokens, part, dtype: tl.constexpr, NUM_INNER: tl.constexpr,
    RANK: tl.constexpr, RANK_P: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The inner values of tokens for outputs of a part, summed over the splits."""
    r_R = tl.arange(0, RANK_P)
    mask_TR = (number_T > 0)[:, None] & (r_R < RANK)[None, :]
    z_at = z_ptr + i_T.to(tl.int64)[:, None] * NUM_INNER + (part * RANK + r_R)[None, :]
    z_TR = tl.zeros((i_T.shape[0], RANK_P), tl.float32)
    for split in tl.static_range(SPLITS):
        at = z_at + num_tokens.to(tl.int64) * (split * NUM_INNER)
        z_TR += tl.load(at, mask=mask_TR, other=0.0)
    return z_TR.to(dtype)


@triton.jit
def _plus_adapter(
    acc_TO, z_TR, own_T, b_ptr, number, o_O, TOTAL: tl.constexpr, RANK: tl.constexpr,
    RANK_P: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + b[number − 1] · z for an adapter's own tokens."""
    r_R = tl.arange(0, RANK_P)
    b_at = b_ptr + ((number - 1).to(tl.int64) * TOTAL + o_O)[None, :] * RANK
    mask_RO = (r_R < RANK)[:, None] & (o_O < TOTAL)[None, :]
    b_RO = tl.load(b_at + r_R[:, None], mask=mask_RO, other=0.0)
    return dot(tl.where(own_T[:, None], z_TR, 0.0).to(z_TR.dtype), b_RO, acc_TO, UPCAST)


@triton.jit(do_not_specialize=["num_tokens"])
def lora_expand_kernel(
    y_ptr,  # [tokens, TOTAL], changed for tokens with adapters, unless SILU_MUL
    out_ptr,  # [tokens, TOTAL / 2], written if SILU_MUL
    z_ptr,  # [SPLITS, tokens, NUM_INNER] fp32
    sorted_ptr,  # [tokens], adapters in their order; 0: none
    order_ptr,  # [tokens]
    b_ptr,  # [slots, TOTAL, RANK]
    num_tokens,
    y_stride,
    TOTAL: tl.constexpr,
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
    SILU_MUL: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t] += b[adapter[t] − 1] · z[t], or silu(gate) · up of that. A program's outputs, and those
    of up, are of one part each."""
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    i_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real_T = i_T < num_tokens
    token_T = tl.load(order_ptr + i_T, mask=real_T, other=0).to(tl.int64)
    number_T = tl.load(sorted_ptr + i_T, mask=real_T, other=0).to(tl.int32)
    first = tl.program_id(1) * OUTPUTS
    o_O = first + tl.arange(0, OUTPUTS)
    number = tl.max(number_T, 0)
    y_at = y_ptr + token_T[:, None] * y_stride + o_O[None, :]
    if SILU_MUL:
        WIDTH: tl.constexpr = TOTAL // 2
        mask_TO = real_T[:, None] & (o_O < WIDTH)[None, :]
        y_TO = tl.load(y_at, mask=mask_TO, other=0.0)
        up_TO = tl.load(y_at + WIDTH, mask=mask_TO, other=0.0)
        if number > 0:
            acc_TO = tl.zeros((TOKENS, OUTPUTS), tl.float32)
            acc_up_TO = tl.zeros((TOKENS, OUTPUTS), tl.float32)
            part = part_of(first, END_0, END_1, END_2, END_3, END_4, END_5, END_6)
            z_TR = _inner_values(
                z_ptr, i_T, number_T, num_tokens, part, dtype, NUM_INNER, RANK, RANK_P, SPLITS
            )
            part = part_of(first + WIDTH, END_0, END_1, END_2, END_3, END_4, END_5, END_6)
            z_up_TR = _inner_values(
                z_ptr, i_T, number_T, num_tokens, part, dtype, NUM_INNER, RANK, RANK_P, SPLITS
            )
            while number > 0:
                own_T = number_T == number
                acc_TO = _plus_adapter(
                    acc_TO, z_TR, own_T, b_ptr, number, o_O, TOTAL, RANK, RANK_P, UPCAST
                )
                acc_up_TO = _plus_adapter(
                    acc_up_TO, z_up_TR, own_T, b_ptr, number, o_O + WIDTH, TOTAL, RANK, RANK_P,
                    UPCAST,
                )  # fmt: skip
                number = _largest(number_T, number)
            y_TO = (y_TO.to(tl.float32) + acc_TO).to(dtype)
            up_TO = (up_TO.to(tl.float32) + acc_up_TO).to(dtype)
        y_TO = finish(y_TO.to(tl.float32), up_TO.to(tl.float32), dtype, True)
        tl.store(out_ptr + token_T[:, None] * WIDTH + o_O[None, :], y_TO, mask=mask_TO)
    elif number > 0:
        mask_TO = (number_T > 0)[:, None] & (o_O < TOTAL)[None, :]
        y_TO = tl.load(y_at, mask=mask_TO, other=0.0)
        acc_TO = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        part = part_of(first, END_0, END_1, END_2, END_3, END_4, END_5, END_6)
        z_TR = _inner_values(
            z_ptr, i_T, number_T, num_tokens, part, dtype, NUM_INNER, RANK, RANK_P, SPLITS
        )
        while number > 0:
            own_T = number_T == number
            acc_TO = _plus_adapter(
                acc_TO, z_TR, own_T, b_ptr, number, o_O, TOTAL, RANK, RANK_P, UPCAST
            )
            number = _largest(number_T, number)
        tl.store(y_at, (y_TO.to(tl.float32) + acc_TO).to(dtype), mask=mask_TO)


class Sizes(NamedTuple):
    """The sizes of both launches: tokens of a program, columns of a split, and the splits."""

    tokens: int
    split_depth: int
    num_splits: int


def sizes_of(
    num_tokens: int, num_inner: int, depth: int, num_processors: int, num_bytes: int
) -> Sizes:
    """Splits of the columns give programs to all multiprocessors. The second launch reads the
    results of all splits, so tokens of many programs have few."""
    tokens = TOKENS if num_tokens <= FEW else MANY_TOKENS
    tiles = triton.cdiv(num_tokens, tokens) * triton.cdiv(num_inner, inner_size(num_inner))
    wanted = max(1, min(MAX_SPLITS, num_processors // tiles))
    least = MIN_COLUMNS
    if wanted < MAX_SPLITS // 2:  # long rows have two programs for each multiprocessor
        wanted, least = 2 * wanted, MIN_COLUMNS_OF_MANY
    unit = columns_of(num_inner, tokens, num_bytes)
    if num_processors < tiles:
        wanted = 1
    columns = triton.cdiv(max(least, triton.cdiv(depth, wanted)), unit) * unit
    return Sizes(tokens, columns, triton.cdiv(depth, columns))


def inner_size(num_inner: int) -> int:
    """The inner values of a program."""
    return max(16, min(INNER, triton.next_power_of_2(num_inner)))


def columns_of(num_inner: int, tokens: int, num_bytes: int) -> int:
    """Columns at a time, of numbers of so many bytes: three stages of x and of a fit 64 KB."""
    fitting = STAGE_BYTES // ((tokens + inner_size(num_inner)) * num_bytes)
    return int(min(256, 1 << (fitting.bit_length() - 1)))


def num_outputs(rows: Sequence[int], rank: int, num_bytes: int, silu_mul: bool) -> int:
    """The outputs of a program: no boundary between parts is within them, and their matrix fits
    the shared memory of all GPUs. With `silu_mul` it has as many of up."""
    fitting = MATRIX_BYTES // (padded_rank(rank) * num_bytes)
    most = min(MAX_OUTPUTS, max(MIN_OUTPUTS, fitting))
    if silu_mul:
        return math.gcd(max(MIN_OUTPUTS, most // 2), sum(rows) // 2, *rows)
    return math.gcd(most, *rows)


def padded_rank(rank: int) -> int:
    return int(max(16, triton.next_power_of_2(rank)))


def shrink_constants(num_inner: int, depth: int, sizes: Sizes, num_bytes: int) -> dict[str, int]:
    """The first kernel's compile-time constants."""
    return {
        "NUM_INNER": num_inner,
        "DEPTH": depth,
        "SPLIT_DEPTH": sizes.split_depth,
        "TOKENS": sizes.tokens,
        "INNER": inner_size(num_inner),
        "COLUMNS": columns_of(num_inner, sizes.tokens, num_bytes),
    }


def part_ends(rows: Sequence[int]) -> dict[str, int]:
    """END_p: the first output after part p."""
    ends = [sum(rows[: i + 1]) for i in range(len(rows))] + [sum(rows)] * MAX_PARTS
    return {f"END_{i}": ends[i] for i in range(MAX_PARTS - 1)}


def expand_constants(
    rows: Sequence[int], rank: int, sizes: Sizes, num_bytes: int, silu_mul: bool
) -> dict[str, int]:
    """The second kernel's compile-time constants."""
    return {
        "TOTAL": sum(rows),
        "NUM_INNER": len(rows) * rank,
        "RANK": rank,
        "RANK_P": padded_rank(rank),
        "SPLITS": sizes.num_splits,
        **part_ends(rows),
        "TOKENS": sizes.tokens,
        "OUTPUTS": num_outputs(rows, rank, num_bytes, silu_mul),
        "SILU_MUL": silu_mul,
    }


def _suits(
    y_TO: Tensor, x_TD: Tensor, matrices: tuple[Tensor, Tensor], rows: Sequence[int], silu_mul: bool
) -> bool:
    """Whether the kernels take these."""
    a_NLD, b_NOR = matrices
    num = num_outputs(rows, b_NOR.shape[2], b_NOR.dtype.itemsize, silu_mul)
    return (
        num >= MIN_OUTPUTS
        and len(rows) <= MAX_PARTS
        and x_TD.dtype == y_TO.dtype == a_NLD.dtype
        and x_TD.stride(1) == y_TO.stride(1) == 1
        and a_NLD.is_contiguous()
        and b_NOR.is_contiguous()
    )


def _launch(
    y_TO: Tensor,
    out_TF: Tensor | None,
    x_TD: Tensor,
    tokens: tuple[Tensor, Tensor],
    matrices: tuple[Tensor, Tensor],
    rows: Sequence[int],
) -> None:
    """Both kernels; `tokens` are the adapters in their order, and the order."""
    (num_tokens, depth), (a_NLD, b_NOR), device = x_TD.shape, matrices, x_TD.device
    num_inner, rank, num_bytes = a_NLD.shape[1], b_NOR.shape[2], x_TD.dtype.itemsize
    sizes = sizes_of(num_tokens, num_inner, depth, num_multiprocessors(device), num_bytes)
    tiles = triton.cdiv(num_tokens, sizes.tokens)
    options = {"UPCAST": device.type == "cpu", **launch_options(device)}
    z_STL = torch.empty(
        (sizes.num_splits, num_tokens, num_inner), dtype=torch.float32, device=device
    )
    lora_shrink_kernel[(tiles, triton.cdiv(num_inner, inner_size(num_inner)), sizes.num_splits)](
        x_TD,
        *tokens,
        a_NLD,
        z_STL,
        num_tokens,
        x_TD.stride(0),
        **shrink_constants(num_inner, depth, sizes, num_bytes),
        num_warps=4,
        **options,
    )
    constants = expand_constants(rows, rank, sizes, num_bytes, out_TF is not None)
    width = sum(rows) if out_TF is None else out_TF.shape[1]
    lora_expand_kernel[(tiles, width // constants["OUTPUTS"])](
        y_TO,
        y_TO if out_TF is None else out_TF,
        z_STL,
        *tokens,
        b_NOR,
        num_tokens,
        y_TO.stride(0),
        **constants,
        num_warps=4,
        **options,
    )


def add_lora_(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    sorted_T: Tensor,
    order_T: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: Sequence[int],
) -> None:
    """`reference.lora.add_lora_`."""
    if not _suits(y_TO, x_TD, (a_NLD, b_NOR), rows, False):
        tokens = adapter_T, sorted_T, order_T
        reference.lora.add_lora_(y_TO, x_TD, *tokens, a_NLD, b_NOR, list(rows))
    elif len(x_TD):
        _launch(y_TO, None, x_TD, (sorted_T, order_T), (a_NLD, b_NOR), rows)


def add_lora(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    sorted_T: Tensor,
    order_T: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: Sequence[int],
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`reference.lora.add_lora`, with a copy: the pass `lora_in_place` avoids it."""
    out_TO = y_TO.clone(memory_format=torch.contiguous_format)
    add_lora_(out_TO, x_TD, adapter_T, sorted_T, order_T, a_NLD, b_NOR, rows)
    return out_TO if residual_TO is None else out_TO + residual_TO


def add_lora_silu(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    sorted_T: Tensor,
    order_T: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: Sequence[int],
) -> Tensor:
    """`reference.lora.add_lora_silu`."""
    if not _suits(y_TO, x_TD, (a_NLD, b_NOR), rows, True):
        tokens = adapter_T, sorted_T, order_T
        return reference.lora.add_lora_silu(y_TO, x_TD, *tokens, a_NLD, b_NOR, list(rows))
    out_TF = y_TO.new_empty((y_TO.shape[0], y_TO.shape[1] // 2))
    if len(x_TD):
        _launch(y_TO, out_TF, x_TD, (sorted_T, order_T), (a_NLD, b_NOR), rows)
    return out_TF
