"""Products with adapters take in their neighbours: a norm before them, SiLU · up after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops

# (x, weight) -> whether the device has a kernel for a whole product with adapters
Takes = Callable[[Tensor, Tensor], bool]


def fuse_lora(graph: GraphModule, fakes: Sequence[Tensor], *, takes: Takes) -> GraphModule:
    """`linear` and its only reader `add_lora`, with the `rms_norm` that only they read and the
    `silu_mul` that alone reads them, become `lora_linear` if `takes(x, weight)`. Otherwise
    `add_lora` and its only reader `silu_mul` become `add_lora_silu`.

    Runs before the passes that fuse products and norms.
    """
    for node in [node for node in graph.graph.nodes if node.target is ops.add_lora]:
        y, x, *rest = node.args
        residual = rest.pop() if len(rest) == 7 else None
        silu_mul = _silu_of(node) if residual is None else None
        if _is_taken(node, takes):
            _fuse(graph, node, residual, silu_mul)
        elif silu_mul is not None:
            with graph.graph.inserting_before(node):
                fused = graph.graph.call_function(ops.add_lora_silu, (y, x, *rest))
            _replace(silu_mul, fused)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _is_taken(node: Node, takes: Takes) -> bool:
    y: Any = node.args[0]
    if y.target is not ops.linear or list(y.users) != [node] or len(y.args) > 3:
        return False
    x, weight = (one.meta["val"] for one in y.args[:2])
    return y.args[0] is node.args[1] and x.dim() == 2 and takes(x, weight)


def _fuse(graph: GraphModule, node: Node, residual: Any, silu_mul: Node | None) -> None:
    y: Any = node.args[0]
    x, weight, bias = (*y.args, None)[:3]
    norm_weight: Any = None
    eps: Any = 0.0
    if x.target is ops.rms_norm and set(x.users) == {y, node}:
        x, norm_weight, eps = x.args
    given = (x, norm_weight, weight, bias, residual, eps, silu_mul is not None, *node.args[2:8])
    with graph.graph.inserting_before(node):
        fused = graph.graph.call_function(ops.lora_linear, given)
    _replace(node if silu_mul is None else silu_mul, fused)


def _replace(node: Node, fused: Node) -> None:
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)


def _silu_of(node: Node) -> Node | None:
    """The silu_mul that is the only reader, or None."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is ops.silu_mul else None
