"""all_reduce → add + RMS norm becomes one op, which is one launch for small tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops


def fuse_reduce_norm(
    graph: GraphModule, fakes: Sequence[Tensor], *, takes: Callable[[Tensor], bool]
) -> GraphModule:
    """Join every `add_rms_norm` with the `all_reduce` that only it reads.

    Runs after `fuse_add_norm`, which moves residuals into norms. `takes` gets the fake summed
    tensor, and returns whether it has few enough rows for one launch.
    """
    for norm in [node for node in graph.graph.nodes if node.target is ops.add_rms_norm]:
        reduced: Any = norm.args[0]
        if _is_plain_sum(reduced) and list(reduced.users) == [norm] and norm.args[1] is not reduced:
            x = reduced.args[0]
            if takes(x.meta["val"]):
                norm.target, norm.args = ops.all_reduce_norm, (x, *norm.args[1:])
                graph.graph.erase_node(reduced)
    graph.recompile()
    return graph


def _is_plain_sum(node: object) -> bool:
    """Whether the node is an `all_reduce` without a residual."""
    return (
        isinstance(node, Node) and node.target is ops.all_reduce and node.args[1:] in ((), (None,))
    )
