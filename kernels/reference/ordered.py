"""Ops whose results for a row have the same bits among any other rows.

The meaning is that of other ops; what is promised beyond it is the order of sums, which a kernel
keeps (`kernels/order.py`). Plain torch does not, so a device without kernels refuses the option
`deterministic`.
"""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels.reference.attention import paged_attention
from nanovllm.kernels.reference.experts import experts
from nanovllm.kernels.reference.ggml import ggml_linear
from nanovllm.kernels.reference.linear import fused_linear, linear_int8
from nanovllm.kernels.reference.lora import add_lora
from nanovllm.kernels.reference.packed import fp8_linear, packed_linear

ordered_add_lora = add_lora
ordered_attention = paged_attention
ordered_experts = experts
ordered_fp8_linear = fp8_linear
ordered_ggml_linear = ggml_linear
ordered_linear_int8 = linear_int8
ordered_packed_linear = packed_linear


def ordered_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """`linear.fused_linear` without a norm, for any number of rows, also without an activation.

    A residual is added to the rounded result.
    """
    return fused_linear(x_TD, None, weight_OD, bias_O, residual_TO, 0.0, silu_mul)
