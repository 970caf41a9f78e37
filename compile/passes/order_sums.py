"""For deterministic engines: ops whose sums have one order, and a check that no other is left."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops

# torch's ops that move numbers and compute none, and whose tags do not say so
MOVES = frozenset({
    "arange", "cat", "clone", "constant_pad_nd", "copy_", "embedding", "empty", "full", "full_like",
    "gather", "index", "index_copy", "index_copy_", "index_put", "index_put_", "index_select",
    "new_empty", "new_full", "new_zeros", "scalar_tensor", "scatter", "zeros", "zeros_like",
    "_to_copy", "repeat", "stack",
})  # fmt: skip
# torch's ops on single numbers that IEEE 754 rounds correctly, so that vectors and the rest of a
# tensor, which a CPU computes in other ways, agree
EXACT = frozenset({
    "abs", "add", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "clamp", "clamp_min",
    "clamp_max", "div", "eq", "floor_divide", "ge", "gt", "le", "logical_and", "logical_not",
    "logical_or", "lt", "masked_fill", "maximum", "minimum", "mul", "ne", "neg", "remainder", "sub",
    "where", "__and__", "__or__", "__xor__", "__rshift__", "__lshift__", "fill", "isnan",
})  # fmt: skip

# `check_order` refuses those that the device has no kernel for
ORDERED = {
    ops.paged_attention: ops.ordered_attention,
    ops.experts: ops.ordered_experts,
    ops.linear_int8: ops.ordered_linear_int8,
    ops.packed_linear: ops.ordered_packed_linear,
    ops.fp8_linear: ops.ordered_fp8_linear,
    ops.ggml_linear: ops.ordered_ggml_linear,
    ops.add_lora: ops.ordered_add_lora,
}


def order_sums(
    graph: GraphModule, fakes: Sequence[Tensor], *, fuses_silu: bool = False
) -> GraphModule:
    """Replace products, attention and experts by those whose sums have one order (see
    `kernels/order.py`).

    fuses_silu: a product takes the SiLU·up that alone reads it.
    """
    for node in list(graph.graph.nodes):
        if node.target in ORDERED:
            node.target = ORDERED[node.target]
        elif node.target is ops.linear:
            x, weight, bias, *residual = node.args
            node.target = ops.ordered_linear
            node.args = (x, weight, bias, residual[0] if residual else None, False)
            if fuses_silu:
                _fuse_silu(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fuse_silu(graph: GraphModule, product: Node) -> None:
    users, has_residual = list(product.users), product.args[3] is not None
    if has_residual or len(users) != 1 or users[0].target is not ops.silu_mul:
        return
    gated = users[0]
    product.args = (*product.args[:4], True)
    product.meta = dict(gated.meta)
    gated.replace_all_uses_with(product)
    graph.graph.erase_node(gated)


def check_order(
    graph: GraphModule, fakes: Sequence[Tensor], *, ours: Collection[str], pointwise: bool
) -> GraphModule:
    """Raise ValueError if a graph has an op whose results for a row may depend on other rows.

    `ours` are our ops that are known not to. `pointwise`: the device computes a function of single
    numbers in one way, wherever they are in a tensor.
    """
    found = sorted({
        str(node.target) for node in graph.graph.nodes
        if node.op == "call_function" and not _is_by_row(node.target, ours, pointwise)
    })  # fmt: skip
    if found:
        raise ValueError(
            f"deterministic=True is not supported for this model on this device: the order of sums "
            f"of {', '.join(found)} is not fixed"
        )
    return graph


def _is_by_row(target: Any, ours: Collection[str], pointwise: bool) -> bool:
    if target is operator.getitem:
        return True
    name = ops.op_name(target)
    if name is not None:
        return name in ours
    if not isinstance(target, torch._ops.OpOverload):
        return False
    plain = target._schema.name.removeprefix("aten::")
    if target.is_view or plain in MOVES or plain in EXACT:
        return True
    return pointwise and torch.Tag.pointwise in target.tags
