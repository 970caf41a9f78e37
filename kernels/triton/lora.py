"""LoRA in Triton: what the adapters of rows add to a product, in two launches.

The first computes the inner values of each token, the second multiplies them and adds the result
to the product in place, or goes on to SiLU · up. A program has a tile of tokens of one adapter
(`reference.lora.adapter_tiles`), so each matrix is read by few programs. Tokens without an adapter
are neither read nor written, but by SiLU · up. There are as many programs as any adapters of so
many tokens need: those without a tile end at once.
`lora_row.py` has kernels for one token.

Shapes: T tokens of a program | D columns at a time | O outputs of a program | L inner values of one
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.reference.lora import max_tiles, tile_tokens
from nanovllm.kernels.triton import lora_sizes
from nanovllm.kernels.triton.common import (
    dot,
    finish,
    launch_options,
    num_multiprocessors,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)
from nanovllm.kernels.triton.lora_sizes import (
    MAX_PARTS,
    MIN_OUTPUTS,
    Sizes,
    expand_constants,
    expand_warps,
    inner_size,
    num_outputs,
    shrink_constants,
    shrink_stages,
    sizes_of,
)


@triton.jit
def _tile(tile_ptr, order_ptr, group, TOKENS: tl.constexpr):
    """The places of a group's tokens in their order, where these end, the tokens, and their
    adapter. The end is 0 for a group without tokens."""
    at = tile_ptr + group * 3
    i_T = tl.load(at) + tl.arange(0, TOKENS)
    end = tl.load(at + 1)
    token_T = tl.load(order_ptr + i_T, mask=i_T < end, other=0).to(tl.int64)
    return i_T, end, token_T, tl.load(at + 2)


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
    order_ptr,  # [tokens]
    tile_ptr,  # [tokens, 3]
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
    """z[split, t, l] = the part of a[adapter − 1, l] · x[t] in the split's columns."""
    wait_for_earlier_kernels(PDL)
    i_T, end, token_T, number = _tile(tile_ptr, order_ptr, tl.program_id(2), TOKENS)
    real_T = i_T < end
    if number > 0:
        l_L = tl.program_id(1) * INNER + tl.arange(0, INNER)
        first = tl.program_id(0) * SPLIT_DEPTH
        x_at = x_ptr + token_T[:, None] * x_stride
        a_at = a_ptr + ((number - 1).to(tl.int64) * NUM_INNER + l_L)[None, :] * DEPTH
        acc_TL = tl.zeros((TOKENS, INNER), tl.float32)
        for start in range(0, SPLIT_DEPTH, COLUMNS):
            d_D = first + start + tl.arange(0, COLUMNS)
            real_D = d_D < tl.minimum(DEPTH, first + SPLIT_DEPTH)
            x_TD = tl.load(x_at + d_D[None, :], mask=real_T[:, None] & real_D[None, :], other=0.0)
            mask_DL = real_D[:, None] & (l_L < NUM_INNER)[None, :]
            a_DL = tl.load(a_at + d_D[:, None], mask=mask_DL, other=0.0)
            acc_TL = dot(x_TD, a_DL, acc_TL, UPCAST)
        z_at = z_ptr + (tl.program_id(0) * num_tokens + i_T).to(tl.int64)[:, None] * NUM_INNER
        mask_TL = real_T[:, None] & (l_L < NUM_INNER)[None, :]
        tl.store(z_at + l_L[None, :], acc_TL, mask=mask_TL)


@triton.jit
def _b_matrix(
    b_ptr, number, o_O, TOTAL: tl.constexpr, RANK: tl.constexpr, RANK_P: tl.constexpr
):  # fmt: skip
    """Rows of an adapter's b; zeros for tokens without one."""
    r_R = tl.arange(0, RANK_P)
    b_at = b_ptr + ((number - 1).to(tl.int64) * TOTAL + o_O)[None, :] * RANK
    mask_RO = (r_R < RANK)[:, None] & (o_O < TOTAL)[None, :] & (number > 0)
    return tl.load(b_at + r_R[:, None], mask=mask_RO, other=0.0)


@triton.jit
def _with_adapter(
    y_TO, b_RO, z_ptr, i_T, mask_T, num_tokens, part, NUM_INNER: tl.constexpr,
    RANK: tl.constexpr, RANK_P: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """y + b · z, in y's dtype. z is the sum of the splits' inner values for a part of the outputs,
    rounded to that dtype. Splits are loaded at once: of one after another, each would change its
    layout through shared memory."""
    r_R = tl.arange(0, RANK_P)
    mask_TR = mask_T[:, None] & (r_R < RANK)[None, :]
    z_at = z_ptr + i_T.to(tl.int64)[:, None] * NUM_INNER + (part * RANK + r_R)[None, :]
    z_TR = tl.zeros((i_T.shape[0], RANK_P), tl.float32)
    for first in tl.static_range(0, SPLITS, AT_ONCE):
        split_S = first + tl.arange(0, AT_ONCE)
        at_STR = z_at[None, :, :] + (split_S * (num_tokens * NUM_INNER).to(tl.int64))[:, None, None]
        mask_STR = (split_S < SPLITS)[:, None, None] & mask_TR[None, :, :]
        z_TR += tl.sum(tl.load(at_STR, mask=mask_STR, other=0.0), 0)
    zeros_TO = tl.zeros((i_T.shape[0], b_RO.shape[1]), tl.float32)
    added_TO = dot(z_TR.to(b_RO.dtype), b_RO, zeros_TO, UPCAST)
    return (y_TO.to(tl.float32) + added_TO).to(y_TO.dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def lora_expand_kernel(
    y_ptr,  # [tokens, TOTAL], changed for tokens with adapters, unless SILU_MUL
    out_ptr,  # [tokens, TOTAL / 2], written if SILU_MUL
    z_ptr,  # [SPLITS, tokens, NUM_INNER] fp32
    order_ptr,  # [tokens]
    tile_ptr,  # [tokens, 3]
    b_ptr,  # [slots, TOTAL, RANK]
    num_tokens,
    y_stride,
    TOTAL: tl.constexpr,
    NUM_INNER: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
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
    """y[t] += b[adapter − 1] · z[t], or silu(gate) · up of that. A program's outputs, and those
    of up, are of one part each.

    All but z is loaded while the first kernel runs: that one has waited for all earlier ones.
    """
    i_T, end, token_T, number = _tile(tile_ptr, order_ptr, tl.program_id(1), TOKENS)
    real_T = i_T < end
    first = tl.program_id(0) * OUTPUTS
    o_O = first + tl.arange(0, OUTPUTS)
    WIDTH: tl.constexpr = TOTAL // 2 if SILU_MUL else TOTAL
    mask_T = real_T & (number > 0)
    mask_TO = (real_T if SILU_MUL else mask_T)[:, None] & (o_O < WIDTH)[None, :]
    y_at = y_ptr + token_T[:, None] * y_stride + o_O[None, :]
    b_RO = _b_matrix(b_ptr, number, o_O, TOTAL, RANK, RANK_P)
    y_TO = tl.load(y_at, mask=mask_TO, other=0.0)
    if SILU_MUL:
        b_up_RO = _b_matrix(b_ptr, number, o_O + WIDTH, TOTAL, RANK, RANK_P)
        up_TO = tl.load(y_at + WIDTH, mask=mask_TO, other=0.0)
    wait_for_earlier_kernels(PDL)
    if end > 0:
        part = part_of(first, END_0, END_1, END_2, END_3, END_4, END_5, END_6)
        y_TO = _with_adapter(
            y_TO, b_RO, z_ptr, i_T, mask_T, num_tokens, part, NUM_INNER, RANK, RANK_P, SPLITS,
            AT_ONCE, UPCAST,
        )  # fmt: skip
        if SILU_MUL:
            part = part_of(first + WIDTH, END_0, END_1, END_2, END_3, END_4, END_5, END_6)
            up_TO = _with_adapter(
                up_TO, b_up_RO, z_ptr, i_T, mask_T, num_tokens, part, NUM_INNER, RANK, RANK_P,
                SPLITS, AT_ONCE, UPCAST,
            )  # fmt: skip
            y_TO = finish(y_TO.to(tl.float32), up_TO.to(tl.float32), y_ptr.dtype.element_ty, True)
            tl.store(out_ptr + token_T[:, None] * WIDTH + o_O[None, :], y_TO, mask=mask_TO)
        else:
            tl.store(y_at, y_TO, mask=mask_TO)


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


def shrink(x_TD: Tensor, order_T: Tensor, tile_T3: Tensor, a_NLD: Tensor) -> Tensor:
    """The inner values of tokens with adapters, in their order: [splits, tokens, L] in fp32."""
    (num_tokens, depth), (num_slots, num_inner, _) = x_TD.shape, a_NLD.shape
    device, num_bytes = x_TD.device, x_TD.dtype.itemsize
    sizes = sizes_of(num_tokens, num_inner, depth, num_multiprocessors(device), num_bytes)
    z_STL = x_TD.new_empty((sizes.num_splits, num_tokens, num_inner), dtype=torch.float32)
    inner_programs = triton.cdiv(num_inner, inner_size(num_inner))
    lora_shrink_kernel[(sizes.num_splits, inner_programs, max_tiles(num_tokens, num_slots))](
        x_TD,
        order_T,
        tile_T3,
        a_NLD,
        z_STL,
        num_tokens,
        x_TD.stride(0),
        **shrink_constants(num_inner, depth, sizes, num_bytes),
        UPCAST=device.type == "cpu",
        num_warps=lora_sizes.SHRINK_WARPS,
        num_stages=shrink_stages(shared_memory_bytes(device)),
        **launch_options(device),
    )
    return z_STL


def expand(
    y_TO: Tensor,
    out_TF: Tensor | None,
    z_STL: Tensor,
    tokens: tuple[Tensor, Tensor],
    b_NOR: Tensor,
    rows: Sequence[int],
) -> None:
    """Add b · z to y, or write silu(gate) · up of that to `out_TF`. `tokens` are their order and
    tiles."""
    (num_splits, num_tokens, _), (num_slots, _, rank) = z_STL.shape, b_NOR.shape
    sizes = Sizes(tile_tokens(num_tokens), 0, num_splits)
    constants = expand_constants(rows, rank, sizes, y_TO.dtype.itemsize, out_TF is not None)
    width = sum(rows) if out_TF is None else out_TF.shape[1]
    programs = triton.cdiv(width, constants["OUTPUTS"])
    lora_expand_kernel[(programs, max_tiles(num_tokens, num_slots))](
        y_TO,
        y_TO if out_TF is None else out_TF,
        z_STL,
        *tokens,
        b_NOR,
        num_tokens,
        y_TO.stride(0),
        **constants,
        UPCAST=y_TO.device.type == "cpu",
        num_warps=expand_warps(constants),
        **launch_options(y_TO.device),
    )


def add_lora_(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    order_T: Tensor,
    tile_T3: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: Sequence[int],
) -> None:
    """`reference.lora.add_lora_`."""
    if not _suits(y_TO, x_TD, (a_NLD, b_NOR), rows, False):
        tokens = adapter_T, order_T, tile_T3
        reference.lora.add_lora_(y_TO, x_TD, *tokens, a_NLD, b_NOR, list(rows))
    elif len(x_TD):
        z_STL = shrink(x_TD, order_T, tile_T3, a_NLD)
        expand(y_TO, None, z_STL, (order_T, tile_T3), b_NOR, rows)


def add_lora(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    order_T: Tensor,
    tile_T3: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: Sequence[int],
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`reference.lora.add_lora`, with a copy: the pass `lora_in_place` avoids it."""
    out_TO = y_TO.clone(memory_format=torch.contiguous_format)
    add_lora_(out_TO, x_TD, adapter_T, order_T, tile_T3, a_NLD, b_NOR, rows)
    return out_TO if residual_TO is None else out_TO + residual_TO


def add_lora_silu(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    order_T: Tensor,
    tile_T3: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: Sequence[int],
) -> Tensor:
    """`reference.lora.add_lora_silu`."""
    if not _suits(y_TO, x_TD, (a_NLD, b_NOR), rows, True):
        tokens = adapter_T, order_T, tile_T3
        return reference.lora.add_lora_silu(y_TO, x_TD, *tokens, a_NLD, b_NOR, list(rows))
    out_TF = y_TO.new_empty((y_TO.shape[0], y_TO.shape[1] // 2))
    if len(x_TD):
        z_STL = shrink(x_TD, order_T, tile_T3, a_NLD)
        expand(y_TO, out_TF, z_STL, (order_T, tile_T3), b_NOR, rows)
    return out_TF
