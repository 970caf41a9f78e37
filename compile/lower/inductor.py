"""FX graph to machine code through Inductor, without Dynamo: Triton kernels on a GPU, C++ on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule


def lower(graph: GraphModule, fakes: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph of static shapes; the result takes the graph's placeholders in order and has no guards."""
    from torch._inductor import standalone_compile

    # standalone_compile takes the graph's fake mode, and with it which dimensions are static, from this key of its
    # outputs, which Dynamo sets and make_fx does not; without it every dimension would be compiled as dynamic.
    outputs: Any = graph.graph.output_node().args[0]
    for node in outputs:
        node.meta["example_value"] = node.meta["val"]
    return standalone_compile(graph, list(fakes), dynamic_shapes="from_graph")
