"""Ops whose results for a row have the same bits among any other rows.

The meaning is that of other ops; what is promised beyond it is the order of sums, which a kernel
keeps (`kernels/order.py`). Plain torch does not, so a device without kernels refuses the option
`deterministic`.
"""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels.reference.attention import paged_attention
from nanovllm.kernels.reference.experts import experts
from nanovllm.kernels.reference.linear import fused_linear

ordered_attention = paged_attention
ordered_experts = experts


def ordered_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """x · weightᵀ + bias, then silu(gate) · up if `silu_mul` (the weight is [gate | up]), then +
    residual. A residual is added to the rounded result."""
    return fused_linear(x_TD, None, weight_OD, bias_O, residual_TO, 0.0, silu_mul)
