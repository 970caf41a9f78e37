"""all_reduce becomes a sum in the memory of its input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.passes.add_in_place import is_view
from nanovllm.kernels import ops


def reduce_in_place(graph: GraphModule, fakes: Sequence[Tensor]) -> GraphModule:
    """Turn every `all_reduce` into `all_reduce_`, which makes no copy.

    It must be the last reader of its input, which must not be an input of the region.
    """
    for node in [node for node in graph.graph.nodes if node.target is ops.all_reduce]:
        x = node.args[0]
        if x.op == "placeholder" or is_view(x) or x in node.args[1:]:
            continue
        others = [user for user in x.users if user is not node]
        if all(user < node and not is_view(user) for user in others):
            with graph.graph.inserting_before(node):
                graph.graph.call_function(ops.all_reduce_, node.args)
            node.replace_all_uses_with(x)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph
