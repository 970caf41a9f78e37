"""Replace our ops with a device's own, or with their plain-torch definitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Interpreter, Node

from nanovllm.compile.trace import make_traced, name_placeholders
from nanovllm.kernels import ops, reference


def replace_ops(
    graph: GraphModule,
    fakes: Sequence[Tensor],
    *,
    table: Mapping[str, Callable[..., Any]] | None = None,
    keep: Callable[[str, Node], bool] = lambda name, node: False,
) -> GraphModule:
    """Replace all our ops by retracing the graph.

    `table` maps names of ops to their replacements. An op without an entry stays if `keep(name,
    node)` is true or if a user requested it by name (`ops.ASKED_FOR`); otherwise its plain-torch
    definition replaces it, which the lowering can fuse with its neighbours.
    """
    replacements = table or {}

    class Replacer(Interpreter):
        def run_node(self, node: Node) -> object:
            name = ops.op_name(node.target)
            if name is None:
                return super().run_node(node)
            replacement: Any = replacements.get(name)
            if replacement is None:
                if name in ops.ASKED_FOR or keep(name, node):
                    return super().run_node(node)
                replacement = reference.meaning(name)
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            return replacement(*args, **kwargs)

    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    first = fakes[0]
    assert isinstance(first, FakeTensor)
    replaced = make_traced(Replacer(graph).run, fakes, first.fake_mode)
    name_placeholders(replaced, names)
    return replaced
