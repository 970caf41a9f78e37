"""Experts whose gate goes through GELU (Gemma 4): all on each rank, or some.

Where the device has no kernel for the whole they are two products with GELU between them.
T tokens | K experts per token | D hidden | F expert width | G = 2F.
"""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.reference.norm_act import gelu_mul
from nanovllm.models import formats
from nanovllm.models.experts.expert_parallel import ExpertParallel
from nanovllm.models.experts.stacked import Stacked


def apply(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, stored: Stacked | ExpertParallel
) -> Tensor:
    """The experts' weighted sum for each token: `reference.experts.experts` with GELU."""
    local_X = stored.local_X if isinstance(stored, ExpertParallel) else None
    gate_up, down = stored.gate_up_EGD, stored.down_EDF
    is_plain = isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    if is_plain and ops.has_kernel(ops.gelu_experts, x_TD.device):
        return ops.gelu_experts(  # type: ignore[no-any-return]
            x_TD, weight_TK, expert_TK, gate_up, down, None, local_X
        )
    return formats.experts_by_products(
        gelu_mul, x_TD, weight_TK, expert_TK, (gate_up, down), None, local_X
    )
