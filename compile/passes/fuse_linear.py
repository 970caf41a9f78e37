"""RMS norm → product (→ SiLU·up) (+ residual) becomes one op.

This pays for few rows, where reading the weights takes most of the product's time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops

# (x, *weight, fuses norm, fuses SiLU·up) -> whether the device's kernel is faster
Takes = Callable[..., bool]


def fuse_linear(
    graph: GraphModule, fakes: Sequence[Tensor], *, takes: Mapping[Any, Takes]
) -> GraphModule:
    """Fuse products with their neighbours if `takes[op](x, *weight, fuses norm, fuses SiLU·up)`.

    `takes` has the products of the formats for which the device has a fused kernel
    (`ops.PRODUCTS`). A norm can be fused if only this product reads it, SiLU·up if only it reads
    the product.
    """
    for linear in [node for node in graph.graph.nodes if node.target in takes]:
        x, weight, _, residual = ops.PRODUCTS[linear.target].parts(linear.args)
        values = [_value(argument) for argument in (x, *weight)]
        if values[0].dim() != 2 or not isinstance(values[0].shape[0], int):
            continue
        is_taken = partial(takes[linear.target], *values)
        norm, silu_mul = _norm_for(linear), None if residual is not None else _silu_of(linear)
        if norm is not None and is_taken(True, silu_mul is not None):
            _fuse(graph, linear, norm, silu_mul)
        elif is_taken(False, silu_mul is not None):
            _fuse(graph, linear, None, silu_mul)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fuse(graph: GraphModule, linear: Node, norm: Node | None, silu_mul: Node | None) -> None:
    product = ops.PRODUCTS[linear.target]
    x, weight, bias, residual = product.parts(linear.args)
    norm_weight: Any = None
    eps: Any = 0.0
    if norm is not None:
        x, norm_weight, eps = norm.args
    last = linear if silu_mul is None else silu_mul
    with graph.graph.inserting_before(linear):
        fused = graph.graph.call_function(
            product.fused, (x, norm_weight, *weight, bias, residual, eps, silu_mul is not None)
        )
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, Node) else argument


def _norm_for(linear: Node) -> Node | None:
    """The rms_norm that only this product reads, or None."""
    norm: Any = linear.args[0]
    is_norm = isinstance(norm, Node) and norm.target is ops.rms_norm
    return norm if is_norm and len(norm.users) == 1 else None


def _silu_of(linear: Node) -> Node | None:
    """The silu_mul that is the only reader of this product, or None."""
    users = list(linear.users)
    return users[0] if len(users) == 1 and users[0].target is ops.silu_mul else None
