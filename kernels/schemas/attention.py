"""Schemas of attention, and of what stores keys, values and latents in a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nanovllm.kernels import flash_attention, reference
from nanovllm.kernels import sdpa as sdpa_attention
from nanovllm.kernels.schemas.registry import define

rope = define(
    "rope(Tensor x, Tensor cos_sin, Tensor pos) -> Tensor",
    reference.rope_store.rope,
    lambda x, cos_sin, pos: torch.empty_like(x, memory_format=torch.contiguous_format),
)
store_kv = define(
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    reference.rope_store.store_kv,
    lambda k, v, k_cache, v_cache, slot, k_scale=None, v_scale=None: None,
)
qk_norm_rope_store = define(
    "qk_norm_rope_store(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos_sin, Tensor pos, "
    "Tensor slot, Tensor(a!) k_cache, Tensor(b!) v_cache, int num_heads, float eps, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    reference.rope_store.qk_norm_rope_store,
    lambda qkv, q_norm, k_norm, cos_sin, pos, slot, k_cache, v_cache, num_heads, *rest: (
        qkv.new_empty((qkv.shape[0], num_heads, k_cache.shape[3]))
    ),
)


def _define_attention(name: str, meaning: Callable[..., Any], last: str = "") -> Any:
    return define(
        f"{name}(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_len, "
        "Tensor q_start, int max_q_len, float scale, int window, "
        f"Tensor? k_scale=None, Tensor? v_scale=None, Tensor? sinks=None{last}) -> Tensor",
        meaning,
        lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
    )


# The next ops have no `end`: it is an input of steps with images, which our own kernels compute.
paged_attention = _define_attention(
    "paged_attention", reference.attention.paged_attention, ", Tensor? end=None"
)
zero_padding_ = define(
    "zero_padding_(Tensor(a!) out, Tensor q_start) -> ()",
    reference.attention.zero_padding_,
    lambda out, q_start: None,
)
# The ops below compute `reference.attention.paged_attention` as well. They stand for the code of
# other packages. Each one runs that code on every device, and no pass replaces it.
OTHERS: dict[str, Callable[..., Any]] = {
    "sdpa": sdpa_attention.paged_attention_sdpa,
    **{
        f"flash_attn_{generation}": partial(flash_attention.paged_attention, generation)
        for generation in flash_attention.SOURCES
    },
}
ATTENTION = {"": paged_attention} | {
    key: _define_attention(f"paged_attention_{key}", code) for key, code in OTHERS.items()
}
ASKED_FOR = frozenset(f"paged_attention_{key}" for key in OTHERS)
# What a deterministic engine has in place of other ops: see `order.py`.
ordered_attention = _define_attention(
    "ordered_attention", reference.ordered.ordered_attention, ", Tensor? end=None"
)
varlen_attention = define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor start, int max_len, float scale) "
    "-> Tensor",
    reference.attention.varlen_attention,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
)
segment_attention = define(
    "segment_attention(Tensor q, Tensor k, Tensor v, Tensor start, int max_len, float scale, "
    "int left, int right) -> Tensor",
    reference.attention.segment_attention,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
)
latent_inputs = define(
    "latent_inputs(Tensor q, Tensor key, Tensor kv, Tensor norm, Tensor cos_sin, Tensor pos, "
    "Tensor slot, Tensor(a!) cache, float eps) -> (Tensor, Tensor)",
    reference.latent_attention.latent_inputs,
    lambda q, key, kv, *rest: (q.new_empty((*q.shape[:2], kv.shape[1])), kv.new_empty(kv.shape)),
)
latent_attention = define(
    "latent_attention(Tensor q, Tensor cache, Tensor block_table, Tensor seq_len, Tensor q_start, "
    "int max_q_len, float scale, int latent_size) -> Tensor",
    reference.latent_attention.latent_attention,
    lambda q, *rest: q.new_empty((*q.shape[:2], rest[-1])),
)
latent_span_attention = define(
    "latent_span_attention(Tensor q, Tensor absorbed_q, Tensor entry, Tensor key, Tensor value, "
    "Tensor cache, Tensor block_table, Tensor seq_len, Tensor q_start, int max_q_len, float scale) "
    "-> Tensor",
    reference.latent_attention.latent_span_attention,
    lambda q, absorbed_q, entry, key, value, *rest: q.new_empty((*q.shape[:2], value.shape[1])),
)
head_linear = define(
    "head_linear(Tensor x, Tensor weight) -> Tensor",
    reference.latent_attention.head_linear,
    lambda x, weight: x.new_empty((*x.shape[:2], weight.shape[1])),
)
