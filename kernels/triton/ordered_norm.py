"""RMS norm of deterministic engines in Triton: the sum of squares has one order in every kernel.

The sum of a layout's own reduction depends on how threads hold a tile. Here 64 sums run along the
width, and neighbours are added in pairs until one is left: the same order in a norm by itself and
inside of a product with few rows (`ordered_gemm.py`).

Shapes: T tokens | D hidden | A rows of one program
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.norm_act import as_rows

LANES = tl.constexpr(64)


@triton.jit
def _halved(x_AL):
    """Sums of neighbours: [A, L] to [A, L / 2]."""
    even, odd = tl.split(tl.reshape(x_AL, (x_AL.shape[0], x_AL.shape[1] // 2, 2)))
    return even + odd


@triton.jit
def norm_factor(x_at, real_A, eps, DIM: tl.constexpr, ALL: tl.constexpr):
    """The factors of rows that begin at x_at [A, 1], in fp32: 1 / sqrt(mean(x²) + eps), [A, 1].

    With ALL every row is real.
    """
    lane_L = tl.arange(0, LANES)
    sum_AL = tl.zeros((real_A.shape[0], LANES), tl.float32)
    for part in tl.static_range((DIM + LANES - 1) // LANES):
        d_L = part * LANES + lane_L
        if (part + 1) * LANES <= DIM and ALL:
            x_AL = tl.load(x_at + d_L[None, :]).to(tl.float32)
        else:
            mask_AL = real_A[:, None] & (d_L < DIM)[None, :]
            x_AL = tl.load(x_at + d_L[None, :], mask=mask_AL, other=0.0).to(tl.float32)
        sum_AL = tl.fma(x_AL, x_AL, sum_AL)
    for _ in tl.static_range(6):
        sum_AL = _halved(sum_AL)
    return tl.rsqrt(sum_AL / DIM + eps)


@triton.jit
def normed(x, factor, weight, dtype: tl.constexpr):
    """Rounds where the reference rounds."""
    return ((x.to(tl.float32) * factor).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def ordered_norm_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [D]
    out_ptr,  # [T, D], written
    num_rows,
    x_stride,
    eps,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row_A = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real_A = row_A < num_rows
    d_Dp = tl.arange(0, DIM_P)
    x_at = x_ptr + row_A[:, None] * x_stride
    mask_ADp = real_A[:, None] & (d_Dp < DIM)[None, :]
    x_ADp = tl.load(x_at + d_Dp[None, :], mask=mask_ADp, other=0.0)
    weight_Dp = tl.load(weight_ptr + d_Dp, mask=d_Dp < DIM, other=0.0)
    factor_A1 = norm_factor(x_at, real_A, eps, DIM, False)
    y_ADp = normed(x_ADp, factor_A1, weight_Dp[None, :], out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_A[:, None] * DIM + d_Dp[None, :], y_ADp, mask=mask_ADp)


def ordered_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`reference.norm_act.rms_norm`."""
    x_TD = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    num_rows, dim = x_TD.shape
    dim_p = triton.next_power_of_2(dim)
    rows = max(1, min(8, 2048 // dim_p))
    ordered_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x_TD,
        weight_D,
        out,
        num_rows,
        x_TD.stride(0),
        eps,
        DIM=dim,
        DIM_P=dim_p,
        ROWS=rows,
        num_warps=4,
        **launch_options(x.device),
    )
    return out
