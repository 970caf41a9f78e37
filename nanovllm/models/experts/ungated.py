"""Experts without a gate (Nemotron-H): down(relu²(up(x))), all on each rank, or some.

They are two products with the activation between them, in any format of weights.
T tokens | K experts per token | E experts | X experts on all ranks | D inputs | F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.models import formats
from nanovllm.models.formats import Weight


class Ungated(NamedTuple):
    """The matrices of all experts. `local_X` is that of `experts.expert_parallel.ExpertParallel`,
    None if all experts are here."""

    up_EFD: Weight
    down_EDF: Weight
    local_X: Tensor | None = None


Stored = Ungated


def relu2(inner: Tensor) -> Tensor:
    """relu(x)², of any shape."""
    return torch.relu(inner).square()


def apply(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, stored: Ungated, residual_TD: Tensor | None
) -> Tensor:
    """The experts' weighted sum for each token, plus the residual: `reference.experts.experts`
    with relu² of up in place of its activation of gate and up."""
    up, down, local_X = stored
    return formats.experts_by_products(
        relu2, x_TD, weight_TK, expert_TK, (up, down), residual_TD, local_X
    )
