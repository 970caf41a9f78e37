"""Head norms, rotation and KV write → attention, found in the graph of a decode step, becomes one op: one launch for two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops

Takes = Callable[[Tensor, Tensor, int, int], bool]


def fuse_rope_attention(graph: GraphModule, fakes: Sequence[Tensor], *, takes: Takes) -> GraphModule:
    """Fuse every `paged_attention` of a decode step with the `qk_norm_rope_store` that it alone reads, both over one cache.

    Where `takes(projection, cache of keys, query heads, window)`, and nothing else sees the cache between the two.
    """
    for attention in [node for node in graph.graph.nodes if node.target is ops.paged_attention]:
        _fuse(graph, attention, takes)
    graph.recompile()
    return graph


def _fuse(graph: GraphModule, attention: Node, takes: Takes) -> None:
    args: Any = attention.args
    store, k_cache, v_cache, block_table, seq_len, _, max_q_len, scale, window = args[:9]
    scales = args[9:]
    if not isinstance(store, Node) or store.target is not ops.qk_norm_rope_store or list(store.users) != [attention]:
        return
    made: Any = store.args
    num_heads = made[8]
    if max_q_len != 1 or made[6:8] != (k_cache, v_cache) or _without_none(made[10:]) != _without_none(scales):
        return
    if any(_sees_between(user, store, attention) for user in (*k_cache.users, *v_cache.users)):
        return
    if not takes(made[0].meta["val"], k_cache.meta["val"], num_heads, window):
        return
    with graph.graph.inserting_before(attention):
        fused = graph.graph.call_function(
            ops.rope_attention, (*made[:10], block_table, seq_len, scale, window, *scales)
        )
    fused.meta = dict(attention.meta)
    attention.replace_all_uses_with(fused)
    graph.graph.erase_node(attention)
    graph.graph.erase_node(store)


def _sees_between(user: Node, store: Node, attention: Node) -> bool:
    """Whether a user of the cache may see that the write has moved down to the attention; a view may at any time."""
    is_view = bool(getattr(user.target, "is_view", False))
    return user not in (store, attention) and (is_view or store < user < attention)


def _without_none(scales: Sequence[object]) -> list[object]:
    return [scale for scale in scales if scale is not None]
