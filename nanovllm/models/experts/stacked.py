"""Experts as they are: the matrices of all experts of a layer in two tensors on the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nanovllm.kernels import ops


class Stacked(NamedTuple):
    """gate_up_EGD holds the rows of each expert's gate, then those of its up."""

    gate_up_EGD: Tensor
    down_EDF: Tensor


Stored = Stacked


def apply(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, stored: Stacked, residual_TD: Tensor | None
) -> Tensor:
    return ops.experts(x_TD, weight_TK, expert_TK, stored.gate_up_EGD, stored.down_EDF, residual_TD)
