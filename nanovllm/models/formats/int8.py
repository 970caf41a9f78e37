"""Weight-only quantization to int8 with one scale per output. O outputs | D depth | T tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops

# Quantizing takes a few times the memory of the rows at hand, and a head has 150,000 rows.
ROWS_AT_ONCE = 4096


class Int8Weight(NamedTuple):
    """weight ≈ values · scale: integers from −127 to 127, and fp32 scales."""

    values_OD: Tensor
    scale_O: Tensor


Stored = Int8Weight


def store(name: str, weight_OD: Tensor) -> Int8Weight:
    """Round to the nearest multiple of each row's scale: the row's largest magnitude / 127.

    No value is off by more than half of its row's scale. Raises ValueError, with the name, for a
    weight that holds NaN or infinity.
    """
    values_OD = torch.empty(weight_OD.shape, dtype=torch.int8, device=weight_OD.device)
    scale_O = torch.empty(weight_OD.shape[0], dtype=torch.float32, device=weight_OD.device)
    parts = zip(*(tensor.split(ROWS_AT_ONCE) for tensor in (weight_OD, values_OD, scale_O)))
    for part_OD, part_values_OD, part_scale_O in parts:
        part_scale_O.copy_(part_OD.abs().amax(1).float() / 127)
        if not part_scale_O.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, so that it cannot be quantized")
        divisor_O = torch.where(part_scale_O == 0, 1.0, part_scale_O)  # a row of zeros
        part_values_OD.copy_((part_OD.float() / divisor_O.unsqueeze(1)).round_().clamp_(-127, 127))
    return Int8Weight(values_OD, scale_O)


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) + shape[0] * torch.float32.itemsize


def linear(
    x_TD: Tensor, weight: Int8Weight, bias_O: Tensor | None, residual_TO: Tensor | None
) -> Tensor:
    return ops.linear_int8(x_TD, weight.values_OD, weight.scale_O, bias_O, residual_TO)


def rows(weight: Int8Weight, first: int) -> Tensor:
    return weight.values_OD[first:].float() * weight.scale_O[first:, None]
