"""Experts with biases and a clamped SwiGLU, as in gpt-oss. Shapes: see the package.

inner = clamped_swiglu(x · gate_upᵀ + gate_up_bias), y = inner · downᵀ + down_bias, and a token's
result is Σ_k weight[t, k] · y of its expert k, + residual.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import embedding

from nanovllm.kernels.reference.experts import expert_linear
from nanovllm.kernels.reference.norm_act import clamped_swiglu
from nanovllm.kernels.reference.packed import packed_expert_linear

# (rows, [T, D] or [T, K, D], and experts [T, K]) -> their products, [T, K, O]
Product = Callable[[Tensor, Tensor], Tensor]


def by_products(
    products: tuple[Product, Product],
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_bias_EG: Tensor,
    down_bias_ED: Tensor,
    alpha: float,
    limit: float,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`clamped_experts` by the products with gate and up, and with down, which see no expert that
    is elsewhere."""
    multiply_gate_up, multiply_down = products
    if local_X is not None:
        expert_TK = local_X[expert_TK.long()]
    own_TK = expert_TK.clamp(min=0)
    gate_up_TKG = multiply_gate_up(x_TD, own_TK) + embedding(own_TK, gate_up_bias_EG)
    inner_TKF = clamped_swiglu(gate_up_TKG, alpha, limit)
    y_TKD = multiply_down(inner_TKF, own_TK).float() + embedding(own_TK, down_bias_ED).float()
    y_TKD = y_TKD * weight_TK.unsqueeze(-1)
    if local_X is not None:
        y_TKD = y_TKD.masked_fill((expert_TK < 0).unsqueeze(-1), 0.0)
    y_TD = y_TKD.sum(1).to(x_TD.dtype)
    return y_TD if residual_TD is None else y_TD + residual_TD


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
    """`experts.experts` with biases and `norm_act.clamped_swiglu` in place of SiLU.

    gate's rows and biases of each expert come before up's. Biases are those of the E matrices.
    """

    def multiply(weight_EOD: Tensor) -> Product:
        return lambda x, own_TK: expert_linear(x, own_TK, weight_EOD)

    return by_products(
        (multiply(gate_up_EGD), multiply(down_EDF)), x_TD, weight_TK, expert_TK, gate_up_bias_EG,
        down_bias_ED, alpha, limit, residual_TD, local_X,
    )  # fmt: skip


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
    """`clamped_experts` with weights in codes, in the order of inputs (see `packed`)."""
    gate_up = (code_EGC, scale_EGG, offset_EGG, table, bits, group)
    down = (down_code_EDC, down_scale_EDG, down_offset_EDG, down_table, down_bits, down_group)
    products = (
        lambda x, own_TK: packed_expert_linear(x, own_TK, *gate_up),
        lambda x, own_TK: packed_expert_linear(x, own_TK, *down),
    )
    return by_products(
        products, x_TD, weight_TK, expert_TK, gate_up_bias_EG, down_bias_ED, alpha, limit,
        residual_TD, local_X,
    )  # fmt: skip
