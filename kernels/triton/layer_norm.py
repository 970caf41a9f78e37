"""Layer norm in Triton, one launch. A program takes some whole rows.

Shapes: T rows | D hidden | W rows of the weight | A rows of one program; "p" after a letter: padded
to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.norm_act import as_rows, norm_tile


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [W, D], row t % W for row t
    bias_ptr,  # [D], read if HAS_BIAS
    out_ptr,  # [T, D], written
    num_rows,
    x_stride,
    eps,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row_A = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d_Dp = tl.arange(0, DIM_P)
    is_dim_Dp = d_Dp < DIM
    mask_ADp = (row_A < num_rows)[:, None] & is_dim_Dp[None, :]
    x_at = x_ptr + row_A[:, None] * x_stride + d_Dp[None, :]
    x_ADp = tl.load(x_at, mask=mask_ADp, other=0.0).to(tl.float32)
    centred_ADp = x_ADp - (tl.sum(x_ADp, 1) / DIM)[:, None]
    centred_ADp = tl.where(mask_ADp, centred_ADp, 0.0)
    factor_A1 = tl.rsqrt(tl.sum(centred_ADp * centred_ADp, 1)[:, None] / DIM + eps)
    if WEIGHT_ROWS == 1:
        weight_Dp = tl.load(weight_ptr + d_Dp, mask=is_dim_Dp, other=0.0).to(tl.float32)
        out_ADp = centred_ADp * factor_A1 * weight_Dp[None, :]
    else:
        weight_at = weight_ptr + (row_A % WEIGHT_ROWS)[:, None] * DIM + d_Dp[None, :]
        out_ADp = centred_ADp * factor_A1
        out_ADp *= tl.load(weight_at, mask=mask_ADp, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias_Dp = tl.load(bias_ptr + d_Dp, mask=is_dim_Dp, other=0.0).to(tl.float32)
        out_ADp += bias_Dp[None, :]
    out_at = out_ptr + row_A[:, None] * DIM + d_Dp[None, :]
    tl.store(out_at, out_ADp.to(out_ptr.dtype.element_ty), mask=mask_ADp)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`reference.norm_act.layer_norm`. The weight is [D], or has the last dimensions of x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x_TD, weight = as_rows(x), weight.contiguous()
    num_rows, dim = x_TD.shape
    rows, num_warps = norm_tile(dim)
    layer_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x_TD,
        weight,
        weight if bias is None else bias,
        out,
        num_rows,
        x_TD.stride(0),
        eps,
        DIM=dim,
        DIM_P=triton.next_power_of_2(dim),
        ROWS=rows,
        WEIGHT_ROWS=weight.numel() // dim,
        HAS_BIAS=bias is not None,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return out
