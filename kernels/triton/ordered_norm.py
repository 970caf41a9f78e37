"""RMS norm of deterministic engines in Triton: the sum of squares has one order.

The sum of a layout's own reduction depends on how threads hold a tile. Here neighbours are added in
pairs until one is left, so a row has the same sum for any number of rows and warps.

Shapes: T tokens | D hidden, Dp padded to a power of two | A rows of one program
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.norm_act import as_rows, norm_tile


@triton.jit
def _pairs(x_AL):
    """Neighbours: [A, L] as two of [A, L / 2]."""
    return tl.split(tl.reshape(x_AL, (x_AL.shape[0], x_AL.shape[1] // 2, 2)))


@triton.jit
def _sum_of_squares(x_AL, LEVELS: tl.constexpr):
    """[A, 2 ** LEVELS] in fp32 to [A, 1]."""
    even_AL, odd_AL = _pairs(x_AL)
    # said so that no compiler chooses which of the two products is rounded
    sum_AL = tl.fma(even_AL, even_AL, odd_AL * odd_AL)
    for _ in tl.static_range(LEVELS - 1):
        even_AL, odd_AL = _pairs(sum_AL)
        sum_AL = even_AL + odd_AL
    return sum_AL


@triton.jit(do_not_specialize=["num_rows"])
def ordered_norm_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [D]
    out_ptr,  # [T, D], written
    num_rows,
    x_stride,
    eps,
    DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    DIM_P: tl.constexpr = 2**LEVELS
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row_A = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d_Dp = tl.arange(0, DIM_P)
    mask_ADp = (row_A < num_rows)[:, None] & (d_Dp < DIM)[None, :]
    x_ADp = tl.load(x_ptr + row_A[:, None] * x_stride + d_Dp[None, :], mask=mask_ADp, other=0.0)
    weight_Dp = tl.load(weight_ptr + d_Dp, mask=d_Dp < DIM, other=0.0).to(tl.float32)
    x_ADp = x_ADp.to(tl.float32)
    factor_A1 = tl.rsqrt(_sum_of_squares(x_ADp, LEVELS) / DIM + eps)
    y_ADp = (x_ADp * factor_A1).to(dtype).to(tl.float32) * weight_Dp[None, :]
    tl.store(out_ptr + row_A[:, None] * DIM + d_Dp[None, :], y_ADp.to(dtype), mask=mask_ADp)


def ordered_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`reference.norm_act.rms_norm`."""
    x_TD = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    num_rows, dim = x_TD.shape
    rows, num_warps = norm_tile(dim)
    ordered_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x_TD,
        weight_D,
        out,
        num_rows,
        x_TD.stride(0),
        eps,
        DIM=dim,
        LEVELS=norm_levels(dim),
        ROWS=rows,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return out


def norm_levels(dim: int) -> int:
    """How often neighbours of a row of `dim` numbers are added."""
    return max(1, (dim - 1).bit_length())
