"""Weight-only quantization: a linear layer's weight as int8 with one factor for each of its outputs.

O outputs | D depth | T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops

# The fields of `dense.Layer` and `dense.Params` that are weights of linear layers.
LINEAR_FIELDS = frozenset({"qkv_ED", "out_DQ", "gate_up_GD", "down_DF", "head_VD"})
ROWS_AT_ONCE = 4096  # quantizing takes a few times their size, and a head has 150,000


class Int8Weight(NamedTuple):
    """weight ≈ values · scale: whole numbers from −127 to 127, and fp32 factors."""

    values_OD: Tensor
    scale_O: Tensor


def quantize_int8(name: str, weight_OD: Tensor) -> Int8Weight:
    """The nearest `Int8Weight` whose largest value in each row is ±127; no value is off by more than half its row's scale.

    Raises ValueError, with the name, for a weight that holds NaN or infinity: int8 could not say so.
    """
    values_OD = torch.empty(weight_OD.shape, dtype=torch.int8, device=weight_OD.device)
    scale_O = torch.empty(weight_OD.shape[0], dtype=torch.float32, device=weight_OD.device)
    parts = zip(
        weight_OD.split(ROWS_AT_ONCE), values_OD.split(ROWS_AT_ONCE), scale_O.split(ROWS_AT_ONCE)
    )
    for part_OD, part_values_OD, part_scale_O in parts:
        part_scale_O.copy_(part_OD.abs().amax(1).float() / 127)
        if not part_scale_O.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, so that it cannot be quantized")
        divisor_O = torch.where(part_scale_O == 0, 1.0, part_scale_O)  # a row of zeros
        part_values_OD.copy_((part_OD.float() / divisor_O.unsqueeze(1)).round_().clamp_(-127, 127))
    return Int8Weight(values_OD, scale_O)


def linear(
    x_TD: Tensor,
    weight: Tensor | Int8Weight,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """x · weightᵀ + bias, then + residual, whatever the weight is stored as."""
    if isinstance(weight, Int8Weight):
        return ops.linear_int8(x_TD, weight.values_OD, weight.scale_O, bias_O, residual_TO)
    return ops.linear(x_TD, weight, bias_O, residual_TO)
