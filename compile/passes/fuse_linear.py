"""RMS norm → product (→ SiLU·up) (+ residual) becomes one op.

This pays for few rows, where reading the weights takes most of the product's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops

Takes = Callable[[Tensor, Tensor, bool, bool], bool]


def fuse_linear(graph: GraphModule, fakes: Sequence[Tensor], *, takes: Takes) -> GraphModule:
    """Fuse every `linear` with its neighbours if `takes(x, weight, fuses norm, fuses SiLU·up)`.

    A norm can be fused if only this product reads it, SiLU·up if only it reads the product.
    """
    for linear in [node for node in graph.graph.nodes if node.target is ops.linear]:
        x, weight = (argument.meta["val"] for argument in linear.all_input_nodes[:2])
        if x.dim() != 2 or not isinstance(x.shape[0], int):
            continue
        norm, silu_mul = _norm_for(linear), _silu_of(linear)
        if norm is not None and takes(x, weight, True, silu_mul is not None):
            _fuse(graph, linear, norm, silu_mul)
        elif takes(x, weight, False, silu_mul is not None):
            _fuse(graph, linear, None, silu_mul)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fuse(graph: GraphModule, linear: Node, norm: Node | None, silu_mul: Node | None) -> None:
    x, weight, bias, residual = (*linear.args, None)[:4]
    norm_weight: Any = None
    eps: Any = 0.0
    if norm is not None:
        x, norm_weight, eps = norm.args
    last = linear if silu_mul is None else silu_mul
    with graph.graph.inserting_before(linear):
        fused = graph.graph.call_function(
            ops.fused_linear, (x, norm_weight, weight, bias, residual, eps, silu_mul is not None)
        )
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)


def _norm_for(linear: Node) -> Node | None:
    """The rms_norm that only this product reads, or None."""
    norm: Any = linear.args[0]
    is_norm = isinstance(norm, Node) and norm.target is ops.rms_norm
    return norm if is_norm and len(norm.users) == 1 else None


def _silu_of(linear: Node) -> Node | None:
    """The silu_mul that is the only reader of this product, or None. A residual prevents fusion."""
    users = list(linear.users)
    if len(linear.args) > 3 and linear.args[3] is not None:
        return None
    return users[0] if len(users) == 1 and users[0].target is ops.silu_mul else None
