"""add_lora becomes an addition in the memory of its product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops

# Products, alone and fused with the ops around them, and where each has its own residual.
OWN_RESIDUAL = {op: product.num_weight_args + 2 for op, product in ops.PRODUCTS.items()} | {
    product.fused: product.num_weight_args + 3
    for product in ops.PRODUCTS.values()
    if product.fused is not None
}


def lora_in_place(graph: GraphModule, fakes: Sequence[Tensor]) -> GraphModule:
    """Turn every `add_lora` that is the only reader of its product into `add_lora_`.

    Runs after `fuse_add_norm`, which moves residuals into norms, and before `add_in_place`: a
    residual that is left goes to the product.
    """
    for node in [node for node in graph.graph.nodes if node.target is ops.add_lora]:
        y, *rest = node.args
        if y.target not in OWN_RESIDUAL or list(y.users) != [node]:
            continue
        residual = rest.pop() if len(rest) == 8 else None
        if residual is not None and not _takes(y, residual):
            continue
        with graph.graph.inserting_before(node):
            graph.graph.call_function(ops.add_lora_, (y, *rest))
        node.replace_all_uses_with(y)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _takes(y: Node, residual: Node) -> bool:
    """Give a product a residual, if it has none yet."""
    place = OWN_RESIDUAL[y.target]
    arguments: list[Any] = [*y.args, *[None] * (place + 1 - len(y.args))]
    if arguments[place] is not None or not (residual < y or residual.op == "placeholder"):
        return False
    arguments[place] = residual
    y.args = tuple(arguments)
    return True
