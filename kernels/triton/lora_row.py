"""A product with one row and what the row's adapter adds to it, in two launches.

The first computes the inner values, with the norm. The second is `gemv.py`, which adds them at its
end; its weights load while the first runs.

Shapes: D depth | L inner values | R rank | A outputs of a warp | W warps
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton.common import finish, launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.gemv import gemv_begin, gemv_products, gemv_wait
from nanovllm.kernels.triton.lora import part_of
from nanovllm.kernels.triton.lora_sizes import MAX_PARTS, part_ends
from nanovllm.kernels.triton.skinny_gemm import tile_constants
from nanovllm.kernels.triton.skinny_tiles import skinny_tile

COLUMNS = 4096  # at a time, of the first launch
MAX_DEPTH = 8 * COLUMNS


@triton.jit
def _early_number(adapter_ptr, SLOTS: tl.constexpr):
    """The adapter's number before the results of earlier kernels are there: any, if the kernel
    before writes it. So it is read again."""
    number = tl.load(adapter_ptr).to(tl.int64)
    return tl.where((number > 0) & (number <= SLOTS), number, 0)


@triton.jit
def lora_row_kernel(
    x_ptr,  # [DEPTH]
    norm_ptr,  # [DEPTH], read if HAS_NORM
    adapter_ptr,  # [1]; 0: none
    a_ptr,  # [slots, NUM_INNER, DEPTH]
    z_ptr,  # [NUM_INNER] fp32, written if there is an adapter
    eps,
    NUM_INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """z[l] = a[adapter − 1, l] · x, or · the normed x. A program computes one.

    a and the norm's weight are loaded while earlier kernels run.
    """
    early = _early_number(adapter_ptr, SLOTS)
    inner = tl.program_id(0)
    a_at = a_ptr + inner * DEPTH
    a, norm = (), ()
    for start in tl.static_range(0, DEPTH, COLUMNS):
        d_C = start + tl.arange(0, COLUMNS)
        mask_C = (d_C < DEPTH) & (early > 0)
        a += (tl.load(a_at + (early - 1) * (NUM_INNER * DEPTH) + d_C, mask=mask_C, other=0.0),)
        if HAS_NORM:
            norm += (tl.load(norm_ptr + d_C, mask=d_C < DEPTH, other=0.0),)
    wait_for_earlier_kernels(PDL, EARLY=True)
    number = tl.load(adapter_ptr, volatile=True).to(tl.int64)
    if number > 0:
        a_at += (number - 1) * (NUM_INNER * DEPTH)
        acc_C = tl.zeros((COLUMNS,), tl.float32)
        square_C = tl.zeros((COLUMNS,), tl.float32)
        for chunk in tl.static_range((DEPTH + COLUMNS - 1) // COLUMNS):
            d_C = chunk * COLUMNS + tl.arange(0, COLUMNS)
            x_C = tl.load(x_ptr + d_C, mask=d_C < DEPTH, other=0.0).to(tl.float32)
            if HAS_NORM:
                square_C += x_C * x_C
                x_C *= norm[chunk].to(tl.float32)
            a_C = a[chunk]
            if number != early:
                a_C = tl.load(a_at + d_C, mask=d_C < DEPTH, other=0.0)
            acc_C += a_C.to(tl.float32) * x_C
        z = tl.sum(acc_C, 0)
        if HAS_NORM:
            z *= tl.rsqrt(tl.sum(square_C, 0) / DEPTH + eps)
        tl.store(z_ptr + inner, z)


@triton.jit
def _b_rows(
    number, b_ptr, row_AW, TOTAL: tl.constexpr, RANK: tl.constexpr, RANK_P: tl.constexpr
):  # fmt: skip
    """Rows of the adapter's b, [A, W, R]; zeros without one."""
    r_R = tl.arange(0, RANK_P)[None, None, :]
    b_at = b_ptr + ((number - 1) * TOTAL + row_AW)[:, :, None] * RANK + r_R
    return tl.load(b_at, mask=(r_R < RANK) & (number > 0), other=0.0)


@triton.jit
def _inner_values(
    number, z_ptr, row_AW, RANK: tl.constexpr, RANK_P: tl.constexpr, END_0: tl.constexpr,
    END_1: tl.constexpr, END_2: tl.constexpr, END_3: tl.constexpr, END_4: tl.constexpr,
    END_5: tl.constexpr, END_6: tl.constexpr,
):  # fmt: skip
    """The inner values that rows of b are multiplied with, [A, W, R]; zeros without an adapter."""
    part_AW = part_of(row_AW, END_0, END_1, END_2, END_3, END_4, END_5, END_6)
    r_R = tl.arange(0, RANK_P)[None, None, :]
    mask = (r_R < RANK) & (number > 0)
    return tl.load(z_ptr + part_AW[:, :, None] * RANK + r_R, mask=mask, other=0.0)


@triton.jit
def lora_gemv_kernel(
    x_ptr,  # [D]
    norm_ptr,  # [D], read if HAS_NORM
    weight_ptr,  # [outputs, D]
    bias_ptr,  # [outputs], read if HAS_BIAS
    residual_ptr,  # [NUM_OUTS], read if HAS_RESIDUAL
    out_ptr,  # [NUM_OUTS], written
    adapter_ptr,  # [1]; 0: none
    z_ptr,  # [parts · RANK] fp32, read if there is an adapter
    b_ptr,  # [slots, outputs, RANK]
    weight_stride,
    eps,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTS: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH_P: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU_MUL: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    END_0: tl.constexpr,
    END_1: tl.constexpr,
    END_2: tl.constexpr,
    END_3: tl.constexpr,
    END_4: tl.constexpr,
    END_5: tl.constexpr,
    END_6: tl.constexpr,
    PDL: tl.constexpr,
):
    """`gemv_kernel` whose products have b[adapter − 1] · z. b is loaded while earlier
    kernels run, as the first weights are."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    TOTAL: tl.constexpr = 2 * NUM_OUTS if SILU_MUL else NUM_OUTS
    early = _early_number(adapter_ptr, SLOTS)
    o_AW, row_AW, w_at, up_at, d_1WC, w, up, norm = gemv_begin(
        norm_ptr, weight_ptr, weight_stride, NUM_OUTS, DEPTH, OUTS, WARPS, COLUMNS, AHEAD,
        HAS_NORM, SILU_MUL, PDL,
    )  # fmt: skip
    b_AWR = _b_rows(early, b_ptr, row_AW, TOTAL, RANK, RANK_P)
    if SILU_MUL:
        b_up_AWR = _b_rows(early, b_ptr, row_AW + NUM_OUTS, TOTAL, RANK, RANK_P)
    gemv_wait(
        weight_ptr, weight_stride, NUM_OUTS, DEPTH, OUTS, COLUMNS, AHEAD, PREFETCH_P, SILU_MUL, PDL
    )
    number = tl.load(adapter_ptr, volatile=True).to(tl.int64)
    if number != early:
        b_AWR = _b_rows(number, b_ptr, row_AW, TOTAL, RANK, RANK_P)
        if SILU_MUL:
            b_up_AWR = _b_rows(number, b_ptr, row_AW + NUM_OUTS, TOTAL, RANK, RANK_P)
    z_AWR = _inner_values(
        number, z_ptr, row_AW, RANK, RANK_P, END_0, END_1, END_2, END_3, END_4, END_5, END_6
    )
    if SILU_MUL:
        z_up_AWR = _inner_values(
            number, z_ptr, row_AW + NUM_OUTS, RANK, RANK_P, END_0, END_1, END_2, END_3, END_4,
            END_5, END_6,
        )  # fmt: skip
    if HAS_RESIDUAL:
        residual_AW = tl.load(residual_ptr + row_AW)
    y_AW, up_AW = gemv_products(
        x_ptr, norm_ptr, bias_ptr, row_AW, w_at, up_at, d_1WC, w, up, norm, eps, NUM_OUTS, DEPTH,
        OUTS, WARPS, COLUMNS, AHEAD, HAS_NORM, HAS_BIAS, SILU_MUL,
    )  # fmt: skip
    y_AW += tl.sum(b_AWR.to(tl.float32) * z_AWR, 2)
    if SILU_MUL:
        up_AW += tl.sum(b_up_AWR.to(tl.float32) * z_up_AWR, 2)
    y_AW = finish(y_AW, up_AW, dtype, SILU_MUL)
    if HAS_RESIDUAL:
        y_AW = (y_AW.to(tl.float32) + residual_AW.to(tl.float32)).to(dtype)
    tl.store(out_ptr + o_AW, y_AW, mask=o_AW < NUM_OUTS)


def takes(x_TD: Tensor, weight_OD: Tensor) -> bool:
    """True if `lora_linear` has kernels for a product."""
    num_rows, depth = x_TD.shape
    is_half = x_TD.dtype in (torch.float16, torch.bfloat16) and weight_OD.dtype is x_TD.dtype
    return num_rows == 1 and is_half and weight_OD.stride(1) == 1 and depth <= MAX_DEPTH


def row_constants(num_slots: int, num_inner: int, depth: int, has_norm: bool) -> dict[str, int]:
    """The first kernel's compile-time constants."""
    return {
        "NUM_INNER": num_inner,
        "DEPTH": depth,
        "SLOTS": num_slots,
        "COLUMNS": min(COLUMNS, triton.next_power_of_2(depth)),
        "HAS_NORM": has_norm,
    }


def end_constants(num_slots: int, rows: Sequence[int], rank: int) -> dict[str, int]:
    """The second kernel's compile-time constants that `gemv_kernel` lacks."""
    rank_p = triton.next_power_of_2(rank)
    return {"SLOTS": num_slots, "RANK": rank, "RANK_P": rank_p, **part_ends(rows)}


def lora_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu_mul: bool,
    adapter_T: Tensor,
    order_T: Tensor,
    tile_T3: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: Sequence[int],
) -> Tensor:
    """`reference.lora.lora_linear`. The inner values are not rounded, and sums are rounded once."""
    num_outs = weight_OD.shape[0] // 2 if silu_mul else weight_OD.shape[0]
    depth, device, rank = x_TD.shape[1], x_TD.device, b_NOR.shape[2]
    tile = skinny_tile(1, num_outs, depth, silu_mul)
    are_plain = a_NLD.is_contiguous() and b_NOR.is_contiguous() and a_NLD.dtype is x_TD.dtype
    if not takes(x_TD, weight_OD) or tile.slices != 1 or len(rows) > MAX_PARTS or not are_plain:
        return reference.lora.lora_linear(
            x_TD, norm_weight_D, weight_OD, bias_O, residual_TO, eps, silu_mul,
            adapter_T, order_T, tile_T3, a_NLD, b_NOR, list(rows),
        )  # fmt: skip
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    num_slots, num_inner, _ = a_NLD.shape
    z_L = torch.empty(num_inner, dtype=torch.float32, device=device)
    lora_row_kernel[(num_inner,)](
        x_TD,
        x_TD if norm_weight_D is None else norm_weight_D,
        adapter_T,
        a_NLD,
        z_L,
        eps,
        **row_constants(num_slots, num_inner, depth, norm_weight_D is not None),
        num_warps=4,
        **launch_options(device),
    )
    out_TO = torch.empty((1, num_outs), dtype=x_TD.dtype, device=device)
    lora_gemv_kernel[(math.ceil(num_outs / tile.outs),)](
        x_TD,
        x_TD if norm_weight_D is None else norm_weight_D,
        weight_OD,
        x_TD if bias_O is None else bias_O,
        x_TD if residual_TO is None else residual_TO,
        out_TO,
        adapter_T,
        z_L,
        b_NOR,
        weight_OD.stride(0),
        eps,
        **tile_constants(tile, num_outs, depth),
        WARPS=tile.num_warps,
        HAS_NORM=norm_weight_D is not None,
        HAS_BIAS=bias_O is not None,
        HAS_RESIDUAL=residual_TO is not None,
        SILU_MUL=silu_mul,
        **end_constants(num_slots, rows, rank),
        num_warps=tile.num_warps,
        **launch_options(device),
    )
    return out_TO
