"""Schemas of norms and of SiLU·up."""

from __future__ import annotations

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.schemas.registry import define

rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference.norm_act.rms_norm,
    lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference.norm_act.add_rms_norm,
    lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
)
layer_norm = define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    reference.norm_act.layer_norm,
    lambda x, weight, bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
silu_mul = define(
    "silu_mul(Tensor gate_up) -> Tensor",
    reference.norm_act.silu_mul,
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
rms_norm_each = define(
    "rms_norm_each(Tensor x, Tensor weight, float eps) -> Tensor",
    reference.drafts.rms_norm_each,
    lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
