"""product + residual becomes a product that adds onto the residual in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from nanovllm.kernels import ops


def add_in_place(graph: GraphModule, fakes: Sequence[Tensor]) -> GraphModule:
    """Turn a product with a residual, such as `linear`, into the op that works in place.

    The product must be the last reader of the residual, which must not be an input of the region.
    """
    for linear in [node for node in graph.graph.nodes if node.target in ops.PRODUCTS]:
        product = ops.PRODUCTS[linear.target]
        if product.in_place is None:
            continue
        x, weight, bias, residual = product.parts(linear.args)
        if residual is None or residual.op == "placeholder" or is_view(residual):
            continue
        others = [user for user in residual.users if user is not linear]
        if x is not residual and all(user < linear and not is_view(user) for user in others):
            with graph.graph.inserting_before(linear):
                graph.graph.call_function(product.in_place, (residual, x, *weight, bias))
            linear.replace_all_uses_with(residual)
            graph.graph.erase_node(linear)
    graph.recompile()
    return graph


def is_view(node: Any) -> bool:
    return bool(getattr(node.target, "is_view", False))
