"""Replace every op of ours by what stands for it on a device, in one more trace of the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Interpreter, Node

from nanovllm.compile.trace import make_traced, name_placeholders
from nanovllm.kernels import ops, reference


def replace_ops(
    graph: GraphModule, fakes: Sequence[Tensor], *, table: Mapping[str, Callable[..., Any]]
) -> GraphModule:
    """Each op of ours becomes the ops of `table[its name]`, or of its plain-torch meaning where the table has no row."""

    class Replacer(Interpreter):
        def run_node(self, node: Node) -> object:
            name = ops.op_name(node.target)
            if name is None:
                return super().run_node(node)
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            stands_for: Any = table.get(name) or getattr(reference, name)
            return stands_for(*args, **kwargs)

    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    first = fakes[0]
    assert isinstance(first, FakeTensor)
    replaced = make_traced(Replacer(graph).run, fakes, first.fake_mode)
    name_placeholders(replaced, names)
    return replaced
