"""add + RMS norm → product (→ SiLU·up), found in a region's graph, becomes one op, where there are so few rows that the
product is a stream of weights; a lone product becomes the same op without its neighbours.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops


def fuse_linear(
    graph: GraphModule, fakes: Sequence[Tensor], *, max_rows: Callable[[int, int, bool], int]
) -> GraphModule:
    """Fuse every `linear` of at most `max_rows(outputs of the weight, depth, norm taken in)` rows with its neighbours.

    A norm is taken in where this product is the only reader of its first result and the limit for that allows. Its second
    result, the new residual, comes from the fused op instead, for whoever reads it.
    """
    for linear in [node for node in graph.graph.nodes if node.target is ops.linear]:
        x, weight = (argument.meta["val"] for argument in linear.all_input_nodes[:2])
        num_outs, depth = weight.shape
        if x.dim() != 2 or not isinstance(x.shape[0], int):
            continue
        norm = _norm_for(linear)
        if norm is not None and x.shape[0] <= max_rows(num_outs, depth, True):
            _fuse(graph, linear, norm)
        elif x.shape[0] <= max_rows(num_outs, depth, False):
            _fuse(graph, linear, None)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fuse(graph: GraphModule, linear: Node, norm: Node | None) -> None:
    x, weight, bias = (*linear.args, None)[:3]
    residual: Any = None
    norm_weight: Any = None
    eps: Any = 0.0
    if norm is not None:
        x, residual, norm_weight, eps = norm.args
    silu_mul = _silu_of(linear)
    last = linear if silu_mul is None else silu_mul
    with graph.graph.inserting_before(linear):
        fused = graph.graph.call_function(
            ops.fused_linear, (x, residual, norm_weight, weight, bias, eps, silu_mul is not None)
        )
        y = graph.graph.call_function(operator.getitem, (fused, 0))
        new_residual = graph.graph.call_function(operator.getitem, (fused, 1))
    y.meta = dict(last.meta)
    last.replace_all_uses_with(y)
    if norm is not None:
        for result in list(norm.users):
            if result.args[1] == 1:
                new_residual.meta = dict(result.meta)
                result.replace_all_uses_with(new_residual)


def _norm_for(linear: Node) -> Node | None:
    """The add_rms_norm whose first result this product alone reads, if nobody reads the new residual before the product."""
    x: Any = linear.args[0]
    if not isinstance(x, Node) or x.target is not operator.getitem or x.args[1] != 0 or len(x.users) != 1:
        return None
    norm = x.args[0]
    if not isinstance(norm, Node) or norm.target is not ops.add_rms_norm:
        return None
    residual_users = [user for result in norm.users if result.args[1] == 1 for user in result.users]
    firsts = [result for result in norm.users if result.args[1] == 0]
    return norm if firsts == [x] and all(linear < user for user in residual_users) else None


def _silu_of(linear: Node) -> Node | None:
    """The silu_mul that alone reads this product."""
    users = list(linear.users)
    return users[0] if len(users) == 1 and users[0].target is ops.silu_mul else None
