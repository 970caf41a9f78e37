"""Norms and activation: kernels of `norm_act.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cpu.library import DTYPE_CODES, RMS_NORM, SILU_MUL, load


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`reference.norm_act.rms_norm` in one pass over the memory."""
    dtype = DTYPE_CODES.get(x_TD.dtype)
    if dtype is None or weight_D.dtype is not x_TD.dtype:
        return reference.norm_act.rms_norm(x_TD, weight_D, eps)
    x_TD, weight_D = x_TD.contiguous(), weight_D.contiguous()
    out_TD, size = torch.empty_like(x_TD), x_TD.shape[-1]
    load().nanovllm_rms_norm(
        RMS_NORM.pack(
            out_TD.data_ptr(),
            0,
            x_TD.data_ptr(),
            0,
            weight_D.data_ptr(),
            x_TD.numel() // max(size, 1),
            size,
            dtype,
            torch.get_num_threads(),
            eps,
        )
    )
    return out_TD


def rms_norm_each(x_TD: Tensor, weight_PE: Tensor, eps: float) -> Tensor:
    """`reference.drafts.rms_norm_each`, part by part."""
    parts = zip(x_TD.chunk(weight_PE.shape[0], dim=1), weight_PE.unbind(0))
    return torch.cat([rms_norm(part_TE, weight_E, eps) for part_TE, weight_E in parts], dim=1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`reference.norm_act.layer_norm` by torch's kernel, which has one weight for all heads."""
    if weight.dim() > 1 or weight.dtype is not x.dtype:
        return reference.norm_act.layer_norm(x, weight, bias, eps)
    return torch.nn.functional.layer_norm(x.contiguous(), weight.shape, weight, bias, eps)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.norm_act.add_rms_norm` in one pass over the memory."""
    dtype = DTYPE_CODES.get(x_TD.dtype)
    if (
        dtype is None
        or residual_TD.dtype is not x_TD.dtype
        or weight_D.dtype is not x_TD.dtype
        or residual_TD.shape != x_TD.shape
    ):
        return reference.norm_act.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    x_TD, residual_TD, weight_D = x_TD.contiguous(), residual_TD.contiguous(), weight_D.contiguous()
    out_TD, sum_TD, size = torch.empty_like(x_TD), torch.empty_like(x_TD), x_TD.shape[-1]
    load().nanovllm_rms_norm(
        RMS_NORM.pack(
            out_TD.data_ptr(),
            sum_TD.data_ptr(),
            x_TD.data_ptr(),
            residual_TD.data_ptr(),
            weight_D.data_ptr(),
            x_TD.numel() // max(size, 1),
            size,
            dtype,
            torch.get_num_threads(),
            eps,
        )
    )
    return out_TD, sum_TD


def silu_mul(gate_up_TG: Tensor) -> Tensor:
    """`reference.norm_act.silu_mul` in one pass over the memory."""
    dtype = DTYPE_CODES.get(gate_up_TG.dtype)
    if dtype is None or gate_up_TG.shape[-1] % 2:
        return reference.norm_act.silu_mul(gate_up_TG)
    gate_up_TG = gate_up_TG.contiguous()
    size = gate_up_TG.shape[-1] // 2
    out_TF = gate_up_TG.new_empty((*gate_up_TG.shape[:-1], size))
    load().nanovllm_silu_mul(
        SILU_MUL.pack(
            out_TF.data_ptr(),
            gate_up_TG.data_ptr(),
            out_TF.numel() // max(size, 1),
            size,
            dtype,
            torch.get_num_threads(),
        )
    )
    return out_TF
