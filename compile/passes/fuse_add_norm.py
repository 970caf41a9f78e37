"""product + residual → RMS norm becomes product → add + RMS norm, which saves one pass over
memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops

# The index of the residual, the last argument, of products, their sums over ranks, and what
# adapters make of them.
RESIDUAL_IDX = {op: product.num_weight_args + 2 for op, product in ops.PRODUCTS.items()}
RESIDUAL_IDX |= {ops.all_reduce: 1, ops.add_lora: 8}


def fuse_add_norm(graph: GraphModule, fakes: Sequence[Tensor]) -> GraphModule:
    """Move the residual of every product into the `rms_norm` that reads the product's result.

    Other nodes that read the result then read the sum that `add_rms_norm` returns.
    """
    for norm in [node for node in graph.graph.nodes if node.target is ops.rms_norm]:
        linear: Any = norm.args[0]
        if (
            isinstance(linear, Node)
            and len(linear.args) > RESIDUAL_IDX.get(linear.target, len(linear.args))
            and linear.args[-1] is not None
        ) and all(user is norm or norm < user for user in linear.users):
            _fuse(graph, linear, norm)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fuse(graph: GraphModule, linear: Node, norm: Node) -> None:
    residual = linear.args[-1]
    with graph.graph.inserting_before(norm):
        fused = graph.graph.call_function(ops.add_rms_norm, (linear, residual, *norm.args[1:]))
        normed = graph.graph.call_function(operator.getitem, (fused, 0))
        total = graph.graph.call_function(operator.getitem, (fused, 1))
    normed.meta, total.meta = dict(norm.meta), dict(linear.meta)
    norm.replace_all_uses_with(normed)
    linear.replace_all_uses_with(total, delete_user_cb=lambda user: user is not fused)
    linear.args = linear.args[:-1]
