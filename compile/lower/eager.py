"""The lowering that compiles nothing: it runs the Python code of the graph, node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule


def lower(graph: GraphModule, fakes: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    def run(*inputs: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return graph(*inputs)

    return run
