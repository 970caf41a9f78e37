"""RMS norm, add + RMS norm and SiLU·up in Triton, one launch each.

They serve eager execution: in compiled programs Inductor fuses the same formulas with their
neighbours. A program takes some whole rows (norms) or a piece of a row (silu_mul). Intermediate
results are rounded as in `reference`.

Shapes: T tokens | D hidden | F ffn size | A rows of one program; "p" after a letter: padded to a
power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D], read if HAS_RESIDUAL
    weight_ptr,  # [D]
    out_ptr,  # [T, D], written
    sum_ptr,  # [T, D], x + residual, written if HAS_RESIDUAL
    num_rows,
    x_stride,
    residual_stride,
    eps,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row_A = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d_Dp = tl.arange(0, DIM_P)
    mask_ADp = (row_A < num_rows)[:, None] & (d_Dp < DIM)[None, :]
    weight_Dp = tl.load(weight_ptr + d_Dp, mask=d_Dp < DIM, other=0.0).to(tl.float32)
    x_ADp = tl.load(x_ptr + row_A[:, None] * x_stride + d_Dp[None, :], mask=mask_ADp, other=0.0).to(
        tl.float32
    )
    if HAS_RESIDUAL:
        x_ADp += tl.load(
            residual_ptr + row_A[:, None] * residual_stride + d_Dp[None, :],
            mask=mask_ADp,
            other=0.0,
        ).to(tl.float32)
        sum_ADp = x_ADp.to(dtype)
        tl.store(sum_ptr + row_A[:, None] * DIM + d_Dp[None, :], sum_ADp, mask=mask_ADp)
        x_ADp = sum_ADp.to(tl.float32)
    factor_A1 = tl.rsqrt(tl.sum(x_ADp * x_ADp, 1)[:, None] / DIM + eps)
    out_ADp = (x_ADp * factor_A1).to(dtype).to(tl.float32) * weight_Dp[None, :]
    tl.store(out_ptr + row_A[:, None] * DIM + d_Dp[None, :], out_ADp.to(dtype), mask=mask_ADp)


def norm_tile(dim: int) -> tuple[int, int]:
    """(rows of one program, warps): about 2048 elements a program.

    Long rows have 16 elements a thread or more.
    """
    dim_p = triton.next_power_of_2(dim)
    return max(1, min(32, 2048 // dim_p)), min(16, max(4, dim_p // 512))


def as_rows(x: Tensor) -> Tensor:
    """x as [rows, last dimension] with a last stride of 1; copies only if strides require it."""
    x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def _norm(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    x_TD = as_rows(x)
    residual_TD = x_TD if residual is None else as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out, total
    num_rows, dim = x_TD.shape
    rows, num_warps = norm_tile(dim)
    rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x_TD,
        residual_TD,
        weight_D,
        out,
        out if total is None else total,
        num_rows,
        x_TD.stride(0),
        residual_TD.stride(0),
        eps,
        DIM=dim,
        DIM_P=triton.next_power_of_2(dim),
        ROWS=rows,
        HAS_RESIDUAL=residual is not None,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return out, total


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; see
    `reference.norm_act.rms_norm`."""
    return _norm(x, None, weight_D, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); see `reference.norm_act.add_rms_norm`."""
    out, total = _norm(x, residual, weight_D, eps)
    assert total is not None
    return out, total


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # [T, 2F]
    out_ptr,  # [T, F], written
    gate_up_stride,
    FFN: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    token_idx = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    at_F = gate_up_ptr + token_idx * gate_up_stride + f_F
    gate_F = tl.load(at_F, mask=f_F < FFN, other=0.0).to(tl.float32)
    up_F = tl.load(at_F + FFN, mask=f_F < FFN, other=0.0).to(tl.float32)
    silu_F = (gate_F / (1.0 + tl.exp(-gate_F))).to(dtype).to(tl.float32)
    tl.store(out_ptr + token_idx * FFN + f_F, (silu_F * up_F).to(dtype), mask=f_F < FFN)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [gate | up]; see `reference.norm_act.silu_mul`."""
    gate_up_TG = as_rows(gate_up)
    ffn = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], ffn), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    piece = min(1024, triton.next_power_of_2(ffn))
    silu_mul_kernel[(gate_up_TG.shape[0], triton.cdiv(ffn, piece))](
        gate_up_TG,
        out,
        gate_up_TG.stride(0),
        FFN=ffn,
        PIECE=piece,
        num_warps=4,
        **launch_options(gate_up.device),
    )
    return out
