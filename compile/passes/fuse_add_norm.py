"""linear + residual → RMS norm, found in a region's graph, becomes linear → add + RMS norm: one pass over memory less."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops


def fuse_add_norm(graph: GraphModule, fakes: Sequence[Tensor]) -> GraphModule:
    """Move the residual of every `linear` into the `rms_norm` that reads its result; other readers get the norm's sum."""
    for norm in [node for node in graph.graph.nodes if node.target is ops.rms_norm]:
        linear: Any = norm.args[0]
        if (
            isinstance(linear, Node)
            and linear.target is ops.linear
            and len(linear.args) > 3
            and linear.args[3] is not None
        ) and all(user is norm or norm < user for user in linear.users):
            _fuse(graph, linear, norm)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fuse(graph: GraphModule, linear: Node, norm: Node) -> None:
    residual = linear.args[3]
    with graph.graph.inserting_before(norm):
        fused = graph.graph.call_function(ops.add_rms_norm, (linear, residual, *norm.args[1:]))
        normed = graph.graph.call_function(operator.getitem, (fused, 0))
        total = graph.graph.call_function(operator.getitem, (fused, 1))
    normed.meta, total.meta = dict(norm.meta), dict(linear.meta)
    norm.replace_all_uses_with(normed)
    linear.replace_all_uses_with(total, delete_user_cb=lambda user: user is not fused)
    linear.args = linear.args[:3]
