"""RMS norm → product with the router → choice of experts becomes one op."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops

Takes = Callable[[Tensor, Tensor], bool]


def fuse_router(graph: GraphModule, fakes: Sequence[Tensor], *, takes: Takes) -> GraphModule:
    """Fuse every `topk_softmax` with the product and the norm before it if `takes(x, router)`.

    Only `topk_softmax` may read the product. Its bias must be there before the norm. Other readers
    of the norm read the fused op's first result.
    """
    for route in [node for node in graph.graph.nodes if node.target is ops.topk_softmax]:
        linear: Any = route.args[0]
        if linear.target is not ops.linear or len(linear.users) > 1:
            continue
        norm, router, bias, residual = (*linear.args, None)[:4]
        if not isinstance(norm, Node) or norm.target is not ops.rms_norm:
            continue
        if residual is not None or not (bias is None or bias < norm):
            continue
        x: Any = norm.args[0]
        if takes(x.meta["val"], router.meta["val"]):
            _fuse(graph, norm, linear, route, () if bias is None else (bias,))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fuse(graph: GraphModule, norm: Any, linear: Any, route: Any, bias: tuple[Any, ...]) -> None:
    x, norm_weight, eps = norm.args
    with graph.graph.inserting_before(norm):
        arguments = (x, norm_weight, linear.args[1], eps, *route.args[1:], *bias)
        fused = graph.graph.call_function(ops.norm_router_topk, arguments)
        normed, *chosen = (
            graph.graph.call_function(operator.getitem, (fused, i)) for i in range(3)
        )
    normed.meta = dict(norm.meta)
    norm.replace_all_uses_with(normed)
    for getitem in list(route.users):
        replacement = chosen[getitem.args[1]]
        replacement.meta = dict(getitem.meta)
        getitem.replace_all_uses_with(replacement)
