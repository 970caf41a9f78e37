"""Products of packed weights by their real values, for weights that a device's kernels do not take.

A product dequantizes its weight to x's dtype in plain torch and multiplies as plain weights are. It
reads no routing on the host, so it can be captured, and `expert_linear` is the device's own.
Shapes: see `reference`.
"""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels import ops, reference


def packed_linear(
    x_TD: Tensor,
    code_OC: Tensor,
    scale_OG: Tensor,
    offset_OG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`reference.packed.packed_linear`; the weight is rounded to x's dtype."""
    weight = code_OC, scale_OG, offset_OG, table, bits, group
    real_OD = reference.packed.unpacked(*weight, x_TD.shape[-1]).to(x_TD.dtype)
    return reference.linear.linear(x_TD, real_OD, bias_O, residual_TO)


def packed_expert_linear(
    x: Tensor,
    expert_TK: Tensor,
    code_EOC: Tensor,
    scale_EOG: Tensor,
    offset_EOG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """`reference.packed.packed_expert_linear`; the weight is rounded to x's dtype."""
    weight = code_EOC, scale_EOG, offset_EOG, table, bits, group
    real_EOD = reference.packed.unpacked(*weight, x.shape[-1]).to(x.dtype)
    return ops.expert_linear(x, expert_TK, real_EOD)


def fp8_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_RG: Tensor,
    block_rows: int,
    block_columns: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`reference.packed.fp8_linear`; the weight is rounded to x's dtype."""
    real_OD = reference.packed.of_fp8(weight_OD, scale_RG, block_rows, block_columns)
    return reference.linear.linear(x_TD, real_OD.to(x_TD.dtype), bias_O, residual_TO)


def fp8_expert_linear(
    x: Tensor,
    expert_TK: Tensor,
    weight_EOD: Tensor,
    scale_ERG: Tensor,
    block_rows: int,
    block_columns: int,
) -> Tensor:
    """`reference.packed.fp8_expert_linear`; the weight is rounded to x's dtype."""
    real_EOD = reference.packed.of_fp8(weight_EOD, scale_ERG, block_rows, block_columns)
    return ops.expert_linear(x, expert_TK, real_EOD.to(x.dtype))
