"""Plain experts: the matrices of all experts of a layer in two tensors on the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nanovllm.models import formats
from nanovllm.models.formats import Weight


class Stacked(NamedTuple):
    """gate_up_EGD holds the rows of each expert's gate, then those of its up."""

    gate_up_EGD: Weight
    down_EDF: Weight


Stored = Stacked


def apply(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, stored: Stacked, residual_TD: Tensor | None
) -> Tensor:
    return formats.experts(x_TD, weight_TK, expert_TK, *stored, residual_TD)
