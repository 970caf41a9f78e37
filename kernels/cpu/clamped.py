"""Experts with biases and a clamped SwiGLU on a CPU, by the products of `experts` and `packed`."""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.cpu.experts import expert_linear
from nanovllm.kernels.cpu.packed import packed_expert_linear
from nanovllm.kernels.reference.clamped import Product, by_products


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
    """`reference.clamped.clamped_experts`. Raises IndexError for an expert that is not there."""

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
    """`reference.clamped.packed_clamped_experts`, with inputs quantized as `packed` says."""
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


KERNELS = {kernel.__name__: kernel for kernel in (clamped_experts, packed_clamped_experts)}


def register() -> None:
    """Make these the ops' CPU kernels. Later calls do nothing."""
    ops.register_kernels("CPU", KERNELS)
