"""Experts with biases and a clamped SwiGLU (gpt-oss), all in two matrices on the device.

T tokens | K experts per token | E experts | X experts on all ranks | D hidden | F expert width
G = 2F.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.reference.clamped import by_products
from nanovllm.models import formats
from nanovllm.models.formats import Weight
from nanovllm.models.formats.packed_weight import PackedWeight


class Clamped(NamedTuple):
    """gate's rows and biases of each expert come before up's. `local_X` is that of
    `experts.expert_parallel.ExpertParallel`, None if all experts are here."""

    gate_up_EGD: Weight
    gate_up_bias_EG: Tensor
    down_EDF: Weight
    down_bias_ED: Tensor
    local_X: Tensor | None = None


class Activation(NamedTuple):
    """The numbers of `reference.norm_act.clamped_swiglu`."""

    alpha: float
    limit: float


def apply(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    stored: Clamped,
    activation: Activation,
    residual_TD: Tensor | None,
) -> Tensor:
    """The experts' weighted sum for each token, plus the residual: see
    `reference.clamped.clamped_experts`."""
    gate_up, gate_up_bias_EG, down, down_bias_ED, local_X = stored
    last = (down_bias_ED, *activation, residual_TD, local_X)
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return ops.clamped_experts(
            x_TD, weight_TK, expert_TK, gate_up, gate_up_bias_EG, down, *last
        )  # type: ignore[no-any-return]
    if isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight):
        is_ordered = gate_up.order_D is not None or down.order_D is not None
        if not is_ordered and ops.has_kernel(ops.packed_clamped_experts, x_TD.device):
            return ops.packed_clamped_experts(
                x_TD, weight_TK, expert_TK, *gate_up.codes, gate_up_bias_EG, *down.codes, *last
            )  # type: ignore[no-any-return]
    products = (
        lambda x, own_TK: formats.expert_linear(x, own_TK, gate_up),
        lambda x, own_TK: formats.expert_linear(x, own_TK, down),
    )
    return by_products(products, x_TD, weight_TK, expert_TK, gate_up_bias_EG, *last)
