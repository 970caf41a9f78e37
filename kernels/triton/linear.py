"""Selects the kernel of each matrix product on a GPU: one of ours, or cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton import gated_gemm, skinny_gemm, skinny_tiles, split_k_gemm


def takes(x_TD: Tensor, weight_OD: Tensor, has_norm: bool, silu_mul: bool) -> bool:
    """True if `fused_linear` beats cuBLAS with separate kernels for norm and activation."""
    num_rows, (weight_rows, depth) = x_TD.shape[0], weight_OD.shape
    if num_rows <= skinny_tiles.max_rows(weight_rows, depth, has_norm):
        return True
    if has_norm:
        return False
    if silu_mul and gated_gemm.takes(x_TD, weight_OD):
        return True
    return num_rows <= split_k_gemm.max_rows(weight_rows, depth)


def fused_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu_mul: bool,
) -> Tensor:
    """`reference.linear.fused_linear` in one launch, for bf16 and fp16 and shapes that `takes`
    accepts.

    The weights (including the norm's weight and the bias) may be read before earlier kernels end,
    so no running kernel may write them.
    """
    dtype, num_rows, has_norm = x_TD.dtype, x_TD.shape[0], norm_weight_D is not None
    if (
        dtype not in (torch.float16, torch.bfloat16)
        or weight_OD.dtype is not dtype
        or weight_OD.stride(1) != 1
        or num_rows == 0
        or not takes(x_TD, weight_OD, has_norm, silu_mul)
    ):
        return reference.linear.fused_linear(
            x_TD, norm_weight_D, weight_OD, bias_O, residual_TO, eps, silu_mul
        )
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    if residual_TO is not None and not residual_TO.is_contiguous():
        residual_TO = residual_TO.clone(memory_format=torch.contiguous_format)
    weight_rows, depth = weight_OD.shape
    if num_rows <= skinny_tiles.max_rows(weight_rows, depth, has_norm):
        return skinny_gemm.skinny_gemm(
            x_TD, norm_weight_D, weight_OD, bias_O, residual_TO, eps, silu_mul
        )
    if silu_mul and residual_TO is None and gated_gemm.takes(x_TD, weight_OD):
        return gated_gemm.gated_gemm(x_TD, weight_OD, bias_O)
    return split_k_gemm.split_k_gemm(x_TD, weight_OD, bias_O, residual_TO, silu_mul)


def linear_(residual_TO: Tensor, x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> None:
    """`reference.linear.linear_` by cuBLAS, which adds the residual in its last step if there is no
    bias.

    It works in place, because torch's out-of-place `addmm` first copies the residual.
    """
    if bias_O is not None or x_TD.dim() != 2:
        reference.linear.linear_(residual_TO, x_TD, weight_OD, bias_O)
    else:
        residual_TO.addmm_(x_TD, weight_OD.t())
