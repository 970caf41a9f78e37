"""Linear layers, alone and fused with the ops around them. Shapes: see the package."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.reference import norm_act


def linear(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None = None
) -> Tensor:
    """x · weightᵀ + bias, then + residual; [T, D], [O, D], [O], [T, O] -> [T, O]."""
    y_TO = torch.nn.functional.linear(x_TD, weight_OD, bias_O)
    return y_TO if residual_TO is None else y_TO + residual_TO


def linear_int8(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """(x · weightᵀ) · scale + bias, then + residual; int8 weights, one fp32 scale for each output.

    Sums are in fp32 and are rounded to x's dtype once, before the residual is added.
    """
    y_TO = (x_TD.float() @ weight_OD.float().t()) * scale_O
    y_TO = (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TD.dtype)
    return y_TO if residual_TO is None else y_TO + residual_TO


def linear_(residual_TO: Tensor, x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> None:
    """residual += x · weightᵀ + bias, in place."""
    residual_TO.add_(linear(x_TD, weight_OD, bias_O))


def fused_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu_mul: bool,
) -> Tensor:
    """A linear layer fused with the ops around it.

    In order: rms_norm(x) if a norm weight is given; x · weightᵀ + bias; silu(gate) · up if
    `silu_mul` (the weight is [gate | up]); + residual if one is given.
    """
    if norm_weight_D is not None:
        x_TD = norm_act.rms_norm(x_TD, norm_weight_D, eps)
    y_TO = linear(x_TD, weight_OD, bias_O)
    y_TO = norm_act.silu_mul(y_TO) if silu_mul else y_TO
    return y_TO if residual_TO is None else y_TO + residual_TO
