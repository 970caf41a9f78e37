"""Equal ops on equal inputs become one, such as rotary rows and cache indices of every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg


def merge_equal(graph: GraphModule, fakes: Sequence[Tensor]) -> GraphModule:
    """Merge calls of the same op on the same arguments, in place.

    Ops that write are never merged. Neither are ops that read memory which the graph writes, also
    through a view: two reads may differ.
    """
    written = _written(graph)
    merged: dict[tuple[object, ...], Node] = {}
    for node in list(graph.graph.nodes):
        is_pure = node.op == "call_function" and not _writes(node)
        if not is_pure or written & {node, *node.all_input_nodes}:
            continue
        key = (node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items()))))
        first = merged.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return graph


def _frozen(argument: object) -> object:
    """An argument as a dictionary key. The type keeps 1, 1.0 and True apart."""
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(part) for part in argument)
    return argument if isinstance(argument, Node) else (type(argument), argument)


def _schema(node: Node) -> torch._C.FunctionSchema | None:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _writes(node: Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _written(graph: GraphModule) -> set[Node]:
    """Nodes whose memory an op of the graph writes, with their views and bases."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        schema = _schema(node)
        if schema is None or not schema.is_mutable:
            continue
        for formal, actual in zip(schema.arguments, node.args):
            if formal.alias_info is not None and formal.alias_info.is_write:
                map_arg(actual, found.add)  # type: ignore[arg-type]
    while True:
        views = {node for node in graph.graph.nodes if _is_view_of(node, found)} - found
        bases = {base for node in found if _is_view(node) for base in node.all_input_nodes} - found
        if not views | bases:
            return found
        found |= views | bases


def _is_view(node: Node) -> bool:
    schema = _schema(node)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _is_view_of(node: Node, bases: set[Node]) -> bool:
    return _is_view(node) and bool(bases & set(node.all_input_nodes))
