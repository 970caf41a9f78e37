"""Replace our ops by their plain-torch meaning where the lowering fuses better than a separate kernel would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Interpreter, Node

from nanovllm.compile.trace import make_traced, name_placeholders
from nanovllm.kernels import ops, reference


def inline_ops(
    graph: GraphModule, fakes: Sequence[Tensor], *, keep: Callable[[str, Node], bool]
) -> GraphModule:
    """Inline every op of ours for which `keep(op name, node)` is false, by tracing the graph once more.

    Ops that the user asked for (`ops.ASKED_FOR`) stay.
    """

    class Inliner(Interpreter):
        def run_node(self, node: Node) -> object:
            name = ops.op_name(node.target)
            if name is None or name in ops.ASKED_FOR or keep(name, node):
                return super().run_node(node)
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            meaning: Any = getattr(reference, name)
            return meaning(*args, **kwargs)

    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    first = fakes[0]
    assert isinstance(first, FakeTensor)
    inlined = make_traced(Inliner(graph).run, fakes, first.fake_mode)
    name_placeholders(inlined, names)
    return inlined
