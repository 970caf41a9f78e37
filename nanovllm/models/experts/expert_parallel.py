"""Whole experts on several ranks (expert parallelism): each rank has some of a layer's experts.

Every rank routes all tokens and computes its own experts' part of the sum over experts. The sum
over ranks, which the layer needs anyway, adds the parts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nanovllm.models import formats
from nanovllm.models.formats import Weight


class ExpertParallel(NamedTuple):
    """The stacked matrices of this rank's experts, as in `Stacked`, and where those are.

    local_X[e] is the place of expert e in the stacks, negative for experts of other ranks (X
    experts on all ranks). It is a tensor, so that the graphs of all ranks are the same.
    """

    local_X: Tensor
    gate_up_EGD: Weight
    down_EDF: Weight


Stored = ExpertParallel


def apply(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    stored: ExpertParallel,
    residual_TD: Tensor | None,
) -> Tensor:
    local_X, gate_up_EGD, down_EDF = stored
    return formats.experts(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD, local_X)
