"""Experts with biases and a clamped SwiGLU in Triton: the launches of other experts."""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels import dequantized
from nanovllm.kernels.reference.clamped import by_products
from nanovllm.kernels.triton import experts as plain
from nanovllm.kernels.triton import packed_codes
from nanovllm.kernels.triton.common import Clamp
from nanovllm.kernels.triton.packed_experts import run_experts


def clamped_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    gate_up_bias_EG: Tensor,
    down_EDF: Tensor,
    down_bias_ED: Tensor,
    alpha: float,
    limit: float,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """See `reference.clamped.clamped_experts`."""
    clamp = Clamp(gate_up_bias_EG.contiguous(), down_bias_ED.contiguous(), alpha, limit)
    weights = (gate_up_EGD, down_EDF)
    if plain.takes(x_TD, weight_TK, expert_TK, *weights):
        return plain.run(
            x_TD, weight_TK, expert_TK, *weights, residual_TD, local_X=local_X, clamp=clamp
        )
    products = (
        lambda x, own_TK: plain.expert_linear(x, own_TK, gate_up_EGD),
        lambda x, own_TK: plain.expert_linear(x, own_TK, down_EDF),
    )
    return by_products(products, x_TD, weight_TK, expert_TK, *clamp, residual_TD, local_X)


def packed_clamped_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    code_EGC: Tensor,
    scale_EGG: Tensor,
    offset_EGG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    gate_up_bias_EG: Tensor,
    down_code_EDC: Tensor,
    down_scale_EDG: Tensor,
    down_offset_EDG: Tensor | None,
    down_table: Tensor | None,
    down_bits: int,
    down_group: int,
    down_bias_ED: Tensor,
    alpha: float,
    limit: float,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """See `reference.clamped.packed_clamped_experts`; weights that no kernel reads are
    dequantized."""
    gate_up = (code_EGC, scale_EGG, offset_EGG, table, bits, group)
    down = (
        down_code_EDC, down_scale_EDG, down_offset_EDG, down_table, down_bits, down_group
    )  # fmt: skip
    clamp = Clamp(gate_up_bias_EG.contiguous(), down_bias_ED.contiguous(), alpha, limit)
    codes = packed_codes.of_packed(*gate_up), packed_codes.of_packed(*down)
    found = run_experts(x_TD, weight_TK, expert_TK, *codes, residual_TD, local_X, clamp)
    if found is not None:
        return found
    products = (
        lambda x, own_TK: dequantized.packed_expert_linear(x, own_TK, *gate_up),
        lambda x, own_TK: dequantized.packed_expert_linear(x, own_TK, *down),
    )
    return by_products(products, x_TD, weight_TK, expert_TK, *clamp, residual_TD, local_X)
