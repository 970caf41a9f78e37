"""Norms and activations. Shapes: see the package."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    The normalisation is in fp32 and is rounded to x's dtype before it is multiplied by the weight.
    """
    x32 = x_TD.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TD.dtype) * weight_D


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual' = x + residual; returns (rms_norm(residual'), residual')."""
    residual_TD = x_TD + residual_TD
    return rms_norm(residual_TD, weight_D, eps), residual_TD


def clamped_swiglu(gate_up_TG: Tensor, alpha: float, limit: float) -> Tensor:
    """(up + 1) · gate · sigmoid(alpha · gate) of an input [gate | up] along the last dimension.

    gate is at most `limit`, and up is between −limit and limit. All is in fp32 and rounded once;
    [T, 2F] -> [T, F]. Source: OpenAI 2025, https://arxiv.org/abs/2508.10925.
    """
    gate_TF, up_TF = gate_up_TG.float().chunk(2, dim=-1)
    gate_TF, up_TF = gate_TF.clamp(max=limit), up_TF.clamp(-limit, limit)
    return ((up_TF + 1) * gate_TF * torch.sigmoid(alpha * gate_TF)).to(gate_up_TG.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean(x)) / sqrt(var(x) + eps) · weight + bias over the last dimension.

    The weight may have more dimensions, such as one for each head. All is in fp32, and is rounded
    to x's dtype once.
    """
    x32 = x.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normed if bias is None else normed + bias.float()).to(x.dtype)


def gelu_mul(gate_up_TG: Tensor) -> Tensor:
    """gelu(gate) · up, with GELU's approximation by tanh; [.., 2F] -> [.., F]."""
    gate_TF, up_TF = gate_up_TG.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate_TF, approximate="tanh") * up_TF


def silu_mul(gate_up_TG: Tensor) -> Tensor:
    """silu(gate) · up of an input [gate | up] along the last dimension; [T, 2F] -> [T, F]."""
    gate_TF, up_TF = gate_up_TG.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TF) * up_TF
