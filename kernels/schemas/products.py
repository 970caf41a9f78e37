"""Schemas of linear layers: one product for each format of weights, and what adapters add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.schemas.registry import define, define_ordered

linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual=None) -> Tensor",
    reference.linear.linear,
    lambda x, weight, bias, residual=None: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
linear_ = define(
    "linear_(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? bias) -> ()",
    reference.linear.linear_,
    lambda residual, x, weight, bias: None,
)
fused_linear = define(
    "fused_linear(Tensor x, Tensor? norm_weight, Tensor weight, Tensor? bias, Tensor? residual, "
    "float eps, bool silu_mul) -> Tensor",
    reference.linear.fused_linear,
    lambda x, norm_weight, weight, bias, residual, eps, silu_mul: x.new_empty(
        (*x.shape[:-1], weight.shape[0] // 2 if silu_mul else weight.shape[0])
    ),
)
# of a deterministic engine, see `order.py`
ordered_linear = define(
    "ordered_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual=None, "
    "bool silu_mul=False) -> Tensor",
    reference.ordered.ordered_linear,
    lambda x, weight, bias, residual=None, silu_mul=False: x.new_empty(
        (*x.shape[:-1], weight.shape[0] // (1 + silu_mul))
    ),
)
linear_int8 = define(
    "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual=None) "
    "-> Tensor",
    reference.linear.linear_int8,
    lambda x, weight, scale, bias, residual=None: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
packed_lookup = define(
    "packed_lookup(Tensor row, Tensor code, Tensor scale, Tensor? offset, Tensor? table, int bits, "
    "int group, int depth, ScalarType dtype) -> Tensor",
    reference.packed.packed_lookup,
    lambda row, code, scale, offset, table, bits, group, depth, dtype: code.new_empty(
        (*row.shape, depth), dtype=dtype
    ),
)
packed_linear = define(
    "packed_linear(Tensor x, Tensor code, Tensor scale, Tensor? offset, Tensor? table, int bits, "
    "int group, Tensor? bias, Tensor? residual=None) -> Tensor",
    reference.packed.packed_linear,
    lambda x, code, *rest: x.new_empty((*x.shape[:-1], reference.packed.num_rows(code))),
)
packed_expert_linear = define(
    "packed_expert_linear(Tensor x, Tensor expert, Tensor code, Tensor scale, Tensor? offset, "
    "Tensor? table, int bits, int group) -> Tensor",
    reference.packed.packed_expert_linear,
    lambda x, expert, code, *rest: x.new_empty((*expert.shape, reference.packed.num_rows(code))),
)
fused_packed_linear = define(
    "fused_packed_linear(Tensor x, Tensor? norm_weight, Tensor code, Tensor scale, Tensor? offset, "
    "Tensor? table, int bits, int group, Tensor? bias, Tensor? residual, float eps, bool silu_mul) "
    "-> Tensor",
    reference.packed.fused_packed_linear,
    lambda x, norm_weight, code, *rest: x.new_empty(
        (*x.shape[:-1], code.shape[0] // 2 if rest[-1] else code.shape[0])
    ),
)
fp8_linear = define(
    "fp8_linear(Tensor x, Tensor weight, Tensor scale, int block_rows, int block_columns, "
    "Tensor? bias, Tensor? residual=None) -> Tensor",
    reference.packed.fp8_linear,
    lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
fp8_expert_linear = define(
    "fp8_expert_linear(Tensor x, Tensor expert, Tensor weight, Tensor scale, int block_rows, "
    "int block_columns) -> Tensor",
    reference.packed.fp8_expert_linear,
    lambda x, expert, weight, *rest: x.new_empty((*expert.shape, weight.shape[1])),
)
fused_fp8_linear = define(
    "fused_fp8_linear(Tensor x, Tensor? norm_weight, Tensor weight, Tensor scale, int block_rows, "
    "int block_columns, Tensor? bias, Tensor? residual, float eps, bool silu_mul) -> Tensor",
    reference.packed.fused_fp8_linear,
    lambda x, norm_weight, weight, *rest: x.new_empty(
        (*x.shape[:-1], weight.shape[0] // 2 if rest[-1] else weight.shape[0])
    ),
)
ggml_lookup = define(
    "ggml_lookup(Tensor row, Tensor block, int ggml_type, ScalarType dtype) -> Tensor",
    reference.ggml.ggml_lookup,
    lambda row, block, ggml_type, dtype: block.new_empty(
        (*row.shape, reference.ggml.depth_of(block, ggml_type)), dtype=dtype
    ),
)
ggml_linear = define(
    "ggml_linear(Tensor x, Tensor block, int ggml_type, Tensor? bias, Tensor? residual=None) "
    "-> Tensor",
    reference.ggml.ggml_linear,
    lambda x, block, *rest: x.new_empty((*x.shape[:-1], block.shape[0])),
)
ggml_expert_linear = define(
    "ggml_expert_linear(Tensor x, Tensor expert, Tensor block, int ggml_type) -> Tensor",
    reference.ggml.ggml_expert_linear,
    lambda x, expert, block, *rest: x.new_empty((*expert.shape, block.shape[1])),
)


class Product(NamedTuple):
    """How passes read and replace a product `op(x, *weight, bias, residual=None)`.

    The weight is in one format, whose parts are `num_weight_args` arguments.

    `fused(x, norm_weight, *weight, bias, residual, eps, silu_mul)` is the product with the ops
    around it, as in `reference.linear.fused_linear`. `in_place(residual, x, *weight, bias)` adds it
    onto the residual. They are None if there is no such op.
    """

    num_weight_args: int
    fused: Any = None
    in_place: Any = None

    def parts(self, args: Sequence[Any]) -> tuple[Any, tuple[Any, ...], Any, Any]:
        """x, weight, bias and residual of a call."""
        x, *rest = (*args, None)[: self.num_weight_args + 3]
        *weight, bias, residual = rest
        return x, tuple(weight), bias, residual


# The products of linear layers: one for each format that has an op.
PRODUCTS: dict[Any, Product] = {
    linear: Product(1, fused_linear, linear_),
    linear_int8: Product(2),
    packed_linear: Product(6, fused_packed_linear),
    fp8_linear: Product(4, fused_fp8_linear),
    ggml_linear: Product(2),
}
# The same in deterministic engines.
ordered_linear_int8 = define_ordered("linear_int8")
ordered_packed_linear = define_ordered("packed_linear")
ordered_fp8_linear = define_ordered("fp8_linear")
ordered_ggml_linear = define_ordered("ggml_linear")
adapter_tiles = define(
    "adapter_tiles(Tensor adapter) -> (Tensor, Tensor)",
    reference.lora.adapter_tiles,
    lambda adapter: (
        torch.empty_like(adapter),
        adapter.new_empty((adapter.shape[0], 3), dtype=torch.int32),
    ),
)
# The same for products in every format: the result of one, plus what the rows' adapters add.
_LORA = "Tensor adapter, Tensor order, Tensor tile, Tensor a, Tensor b, int[] rows"
_ADD_LORA = f"Tensor x, {_LORA}"
add_lora = define(
    f"add_lora(Tensor y, {_ADD_LORA}, Tensor? residual=None) -> Tensor",
    reference.lora.add_lora,
    lambda y, *rest: torch.empty_like(y, memory_format=torch.contiguous_format),
)
ordered_add_lora = define_ordered("add_lora")
add_lora_ = define(
    f"add_lora_(Tensor(a!) y, {_ADD_LORA}) -> ()", reference.lora.add_lora_, lambda y, *rest: None
)
add_lora_silu = define(
    f"add_lora_silu(Tensor y, {_ADD_LORA}) -> Tensor",
    reference.lora.add_lora_silu,
    lambda y, *rest: y.new_empty((y.shape[0], y.shape[1] // 2)),
)
lora_linear = define(
    "lora_linear(Tensor x, Tensor? norm_weight, Tensor weight, Tensor? bias, Tensor? residual, "
    f"float eps, bool silu_mul, {_LORA}) -> Tensor",
    reference.lora.lora_linear,
    lambda x, norm, weight, bias, residual, eps, silu_mul, *rest: x.new_empty(
        (x.shape[0], weight.shape[0] // (2 if silu_mul else 1))
    ),
)
