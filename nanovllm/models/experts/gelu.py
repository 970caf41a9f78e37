"""Experts whose gate goes through GELU (Gemma 4), stored plainly: all on each rank, or some.

No kernel computes them as a whole: they are two products with GELU between them.
T tokens | K experts per token | D hidden | F expert width | G = 2F.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu

from nanovllm.models import formats
from nanovllm.models.experts.expert_parallel import ExpertParallel
from nanovllm.models.experts.stacked import Stacked


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up, with GELU's approximation by tanh: [.., G] to [.., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate, approximate="tanh") * up


def apply(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, stored: Stacked | ExpertParallel
) -> Tensor:
    """The experts' weighted sum for each token: `reference.experts.experts` with GELU."""
    local_X = stored.local_X if isinstance(stored, ExpertParallel) else None
    matrices = (stored.gate_up_EGD, stored.down_EDF)
    return formats.experts_by_products(
        gelu_mul, x_TD, weight_TK, expert_TK, matrices, None, local_X
    )
