"""AOTAutograd for Ascend's compilers, which take functional graphs of few ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule


def functional(
    graph: GraphModule,
    examples: Sequence[Any],
    decompositions: Mapping[Any, Callable[..., Any]],
    compiler: Callable[[GraphModule, list[Any]], Any],
) -> Any:
    """Make the graph functional, decompose it, merge equal ops; returns `compiler(graph, inputs)`.

    Writes to inputs become copies at the end of the graph. Placeholders with `node.meta["frozen"]`
    are weights, whose memory never moves: the fake inputs of `compiler` are marked so.
    """
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.compile_utils import fx_graph_cse

    placeholders = graph.graph.find_nodes(op="placeholder")
    frozen = [node.meta.get("frozen", False) for node in placeholders]
    compiled: list[Any] = []

    def convert(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        for tensor, is_frozen in zip(example_inputs, frozen, strict=True):
            if is_frozen:
                tensor._torchair_is_parameter = True
        # merge indices and rotary rows, which every layer computes again
        merged = GraphModule(gm, fx_graph_cse(gm.graph))
        compiled.append(compiler(merged, list(example_inputs)))
        return gm

    with torch.no_grad():
        aot_module_simplified(
            graph,
            list(examples),
            fw_compiler=convert,
            bw_compiler=None,
            inference_compiler=convert,
            decompositions=dict(decompositions),
            keep_inference_input_mutations=True,
        )
    (result,) = compiled
    return result
