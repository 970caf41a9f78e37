"""RMS norm → product (→ SiLU·up) (+ residual), found in a region's graph, becomes one op, where there are so few rows that
the product is a stream of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops


def fuse_linear(
    graph: GraphModule, fakes: Sequence[Tensor], *, max_rows: Callable[[int, int, bool], int]
) -> GraphModule:
    """Fuse every `linear` of at most `max_rows(outputs of the weight, depth, norm taken in)` rows with its neighbours.

    A norm is taken in where this product alone reads it and the limit for that allows.
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
    x, weight, bias, residual = (*linear.args, None)[:4]
    norm_weight: Any = None
    eps: Any = 0.0
    if norm is not None:
        x, norm_weight, eps = norm.args
    silu_mul = _silu_of(linear) if residual is None else None
    last = linear if silu_mul is None else silu_mul
    with graph.graph.inserting_before(linear):
        fused = graph.graph.call_function(
            ops.fused_linear, (x, norm_weight, weight, bias, residual, eps, silu_mul is not None)
        )
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)


def _norm_for(linear: Node) -> Node | None:
    """The rms_norm that this product alone reads."""
    norm: Any = linear.args[0]
    return norm if isinstance(norm, Node) and norm.target is ops.rms_norm and len(norm.users) == 1 else None


def _silu_of(linear: Node) -> Node | None:
    """The silu_mul that alone reads this product."""
    users = list(linear.users)
    return users[0] if len(users) == 1 and users[0].target is ops.silu_mul else None
