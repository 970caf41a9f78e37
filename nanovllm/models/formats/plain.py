"""Weights as they are: one tensor in the model's dtype. O outputs | D depth | T tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanovllm.kernels import ops

Stored = Tensor


def store(name: str, weight_OD: Tensor) -> Tensor:
    """The weight itself, not a copy."""
    return weight_OD


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def linear(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None
) -> Tensor:
    return ops.linear(x_TD, weight_OD, bias_O, residual_TO)


def rows(weight_OD: Tensor, first: int) -> Tensor:
    return weight_OD[first:].float()
