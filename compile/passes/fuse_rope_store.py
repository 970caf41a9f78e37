"""split → (q norm, k norm) → rope → KV write becomes one op: one launch instead of five."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops


def fuse_rope_store(graph: GraphModule, fakes: Sequence[Tensor]) -> GraphModule:
    """Fuse every `store_kv` whose key and value, with a query, come from one packed projection."""
    for store in [node for node in graph.graph.nodes if node.target is ops.store_kv]:
        _fuse(graph, store)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fuse(graph: GraphModule, store: Node) -> None:
    key, value, k_cache, v_cache, slot, *scales = store.args
    key_source = _rotated(key)
    if key_source is None:
        return
    k_part, k_norm, k_eps, cos_sin, pos = key_source
    split = k_part.args[0]
    if not _is_part(k_part, split, 1) or not _is_part(value, split, 2):
        return
    if len(split.args[1]) != 3 or split.args[2:] != (1,):
        return
    for query in [node for node in graph.graph.nodes if node.target is ops.rope]:
        source = _rotated(query)
        if source is None or not _is_part(source[0], split, 0) or source[3:] != (cos_sin, pos):
            continue
        q_norm, q_eps = source[1:3]
        epsilons = {q_eps, k_eps} - {None}
        if len(epsilons) > 1:
            continue
        packed = split.args[0].args[0]  # the input of the view that splits off the heads
        num_heads, target = split.args[1][0], (slot, k_cache, v_cache)
        eps = epsilons or {0.0}
        args = (packed, q_norm, k_norm, cos_sin, pos, *target, num_heads, *eps, *scales)
        place = _place(graph, store, query)
        if place is None:
            continue
        with graph.graph.inserting_before(place):
            fused = graph.graph.call_function(ops.qk_norm_rope_store, args)
        fused.meta = dict(query.meta)
        query.replace_all_uses_with(fused)
        graph.graph.erase_node(store)
        return


def _place(graph: GraphModule, store: Node, query: Node) -> Node | None:
    """What the fused op goes before: the store, or the query if something reads it earlier. None if
    the store's other inputs are not known there, or something reads the cache between the two."""
    order = {node: idx for idx, node in enumerate(graph.graph.nodes)}
    if all(order[user] > order[store] for user in query.users):
        return store
    cache = [arg for arg in store.args[2:] if isinstance(arg, Node)]
    is_known = all(order[arg] < order[query] for arg in cache)
    users = [user for arg in cache for user in arg.users]
    is_read = any(order[query] < order[user] < order[store] for user in users)
    return query if is_known and not is_read else None


def _rotated(node: Any) -> tuple[Any, Any, Any, Any, Any] | None:
    """The operands of rope(part) or rope(rms_norm(part)), where `part` is a part of a split.

    Returns (part, the norm's weight or None, its eps or None, table, positions), or None for any
    other node.
    """
    if not isinstance(node, Node) or node.target is not ops.rope:
        return None
    source: Any
    source, cos_sin, pos = node.args
    weight: Any = None
    eps: Any = None
    if isinstance(source, Node) and source.target is ops.rms_norm:
        source, weight, eps = source.args
    if not isinstance(source, Node) or source.target is not operator.getitem:
        return None
    split = source.args[0]
    if not isinstance(split, Node) or split.target is not torch.ops.aten.split_with_sizes.default:
        return None
    view = split.args[0]
    if not isinstance(view, Node) or view.target is not torch.ops.aten.view.default:
        return None
    return source, weight, eps, cos_sin, pos


def _is_part(node: object, split: object, idx: int) -> bool:
    return isinstance(node, Node) and node.target is operator.getitem and node.args == (split, idx)
