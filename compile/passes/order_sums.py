"""For deterministic engines: ops whose sums have one order, and a check that no other is left."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
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
FusesNorm = Callable[[Tensor, Tensor], bool]


def order_sums(
    graph: GraphModule, fakes: Sequence[Tensor], *, fuses_norm: FusesNorm | None = None
) -> GraphModule:
    """Replace products, attention and experts by those whose sums have one order (see
    `kernels/order.py`).

    With `fuses_norm` norms are replaced too, and a product takes the SiLU·up that alone reads it,
    and the norm that it alone reads if `fuses_norm(x, weight)`.
    """
    for node in list(graph.graph.nodes):
        if node.target in ORDERED:
            node.target = ORDERED[node.target]
        elif node.target is ops.linear:
            x, weight, bias, *residual = node.args
            node.target = ops.ordered_linear
            node.args = (x, None, weight, bias, residual[0] if residual else None, 0.0, False)
            if fuses_norm is not None:
                _fuse_silu(graph, node)
                _fuse_norm(node, fuses_norm)
    graph.graph.eliminate_dead_code()
    if fuses_norm is not None:
        for norm in graph.graph.find_nodes(op="call_function", target=ops.rms_norm):
            norm.target = ops.ordered_norm
    graph.recompile()
    return graph


def _fuse_silu(graph: GraphModule, product: Node) -> None:
    users, has_residual = list(product.users), product.args[4] is not None
    if has_residual or len(users) != 1 or users[0].target is not ops.silu_mul:
        return
    gated = users[0]
    product.args = (*product.args[:6], True)
    product.meta = dict(gated.meta)
    gated.replace_all_uses_with(product)
    graph.graph.erase_node(gated)


def _fuse_norm(product: Node, fuses_norm: FusesNorm) -> None:
    norm: Any = product.args[0]
    if not isinstance(norm, Node) or norm.target is not ops.rms_norm or len(norm.users) > 1:
        return
    x, norm_weight, eps = norm.args
    weight: Any = product.args[2]
    assert isinstance(x, Node)
    if x.meta["val"].dim() == 2 and fuses_norm(x.meta["val"], weight.meta["val"]):
        product.args = (x, norm_weight, *product.args[2:5], eps, product.args[6])


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
