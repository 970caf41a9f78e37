"""Sums and gathers over ranks in Ascend IR: the ops HcomAllReduce and HcomAllGather.

torchair's converters take torch.distributed's global groups and write a group's name into the
graph. Ours write a placeholder, which a program replaces by the name of the group in use when it
first runs. A rank is an input of the graph. So all ranks share one stored graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm.kernels import collectives, ops

ANY_GROUP = "<group>"
RANK = "own_rank"  # the placeholder's name
NO_FUSION = 0  # GE could join several sums into one


@cache
def register() -> None:
    """Register converters of our ops with torchair, once in a process."""
    from torchair import register_fx_node_ge_converter

    register_fx_node_ge_converter(ops.all_reduce)(_all_reduce)
    register_fx_node_ge_converter(ops.all_gather)(_all_gather)


def _all_reduce(x: Any, residual: Any = None, meta_outputs: Any = None) -> Any:
    from torchair._ge_concrete_graph import ge_apis

    assert residual is None, "the residual is a separate op"
    return ge_apis.HcomAllReduce(x, reduction="sum", group=ANY_GROUP, fusion=NO_FUSION)


def _all_gather(x: Any, num_ranks: int, meta_outputs: Any = None) -> Any:
    from torchair._ge_concrete_graph import ge_apis

    rows = ge_apis.HcomAllGather(x, rank_size=num_ranks, group=ANY_GROUP, fusion=NO_FUSION)
    return ge_apis.Reshape(rows, list(meta_outputs.size))


def rank_as_input(graph: GraphModule, fakes: Sequence[Tensor]) -> list[Tensor]:
    """Replace the ops `own_rank` by one new placeholder after all others; returns its fake, or
    none if the graph needs no rank."""
    found = [node for node in graph.graph.nodes if node.target is ops.own_rank]
    if not found:
        return []
    *_, last = graph.graph.find_nodes(op="placeholder")
    with graph.graph.inserting_after(last):
        rank = graph.graph.placeholder(RANK)
    rank.meta = dict(found[0].meta)
    for node in found:
        node.replace_all_uses_with(rank)
        graph.graph.erase_node(node)
    graph.recompile()
    with fakes[0].fake_mode:  # type: ignore[attr-defined]
        return [torch.empty(1, dtype=torch.int64, device=fakes[0].device)]


def join(module: ModuleType, folder_option: str) -> None:
    """Put the group in use into a generated graph that GE has not compiled yet.

    GE keeps the compiled graph in a separate folder for each group and rank, since ranks compile at
    the same time.
    """
    group = collectives.in_use()
    members = [op for op in module.ge_graph.op if op.type.startswith("Hcom")]
    if group is None:
        assert not members, "a graph with collectives runs outside `using`"
        return
    for op in members:
        assert op.attr["group"].s == ANY_GROUP.encode(), op.name
        op.attr["group"].s = group.name.encode()
    folder = module.local_compile_options.get(folder_option)
    if folder is not None:
        own = Path(folder) / f"{group.name}-{group.rank}"
        module.local_compile_options[folder_option] = str(own)
