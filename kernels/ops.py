"""Op schemas: the vocabulary that models, passes and lowerings share.

Every op has a schema, a fake (shape) kernel and a plain-torch meaning in `reference/`. The
meaning runs on devices without a registered kernel. Platforms add kernels with `register_kernels`;
models call the functions below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import collectives, flash_attention, reference
from nanovllm.kernels import gated_delta as chunked
from nanovllm.kernels import sdpa as sdpa_attention
from nanovllm.kernels import ssd as chunked_ssd

_library = torch.library.Library("nanovllm", "DEF")
_registered: dict[tuple[str, str], Callable[..., Any]] = {}
_defined: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {}


def _define(schema: str, meaning: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nanovllm::{name}", fake, lib=_library)
    _defined[name] = schema, meaning, fake
    return getattr(torch.ops.nanovllm, name).default


def _define_ordered(name: str) -> Any:
    """An op like that of this name, whose sums have one order: see `order.py`."""
    schema, meaning, fake = _defined[name]
    return _define(f"ordered_{schema}", meaning, fake)


rms_norm = _define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference.norm_act.rms_norm,
    lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
add_rms_norm = _define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference.norm_act.add_rms_norm,
    lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
)
layer_norm = _define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    reference.norm_act.layer_norm,
    lambda x, weight, bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
silu_mul = _define(
    "silu_mul(Tensor gate_up) -> Tensor",
    reference.norm_act.silu_mul,
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
rope = _define(
    "rope(Tensor x, Tensor cos_sin, Tensor pos) -> Tensor",
    reference.rope_store.rope,
    lambda x, cos_sin, pos: torch.empty_like(x, memory_format=torch.contiguous_format),
)
store_kv = _define(
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    reference.rope_store.store_kv,
    lambda k, v, k_cache, v_cache, slot, k_scale=None, v_scale=None: None,
)
qk_norm_rope_store = _define(
    "qk_norm_rope_store(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos_sin, Tensor pos, "
    "Tensor slot, Tensor(a!) k_cache, Tensor(b!) v_cache, int num_heads, float eps, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    reference.rope_store.qk_norm_rope_store,
    lambda qkv, q_norm, k_norm, cos_sin, pos, slot, k_cache, v_cache, num_heads, *rest: (
        qkv.new_empty((qkv.shape[0], num_heads, k_cache.shape[3]))
    ),
)


def _define_attention(name: str, meaning: Callable[..., Any], last: str = "") -> Any:
    return _define(
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
zero_padding_ = _define(
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
ordered_linear = _define(
    "ordered_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual=None, "
    "bool silu_mul=False) -> Tensor",
    reference.ordered.ordered_linear,
    lambda x, weight, bias, residual=None, silu_mul=False: x.new_empty(
        (*x.shape[:-1], weight.shape[0] // (1 + silu_mul))
    ),
)

varlen_attention = _define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor start, int max_len, float scale) "
    "-> Tensor",
    reference.attention.varlen_attention,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
)

segment_attention = _define(
    "segment_attention(Tensor q, Tensor k, Tensor v, Tensor start, int max_len, float scale, "
    "int left, int right) -> Tensor",
    reference.attention.segment_attention,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
)

latent_inputs = _define(
    "latent_inputs(Tensor q, Tensor key, Tensor kv, Tensor norm, Tensor cos_sin, Tensor pos, "
    "Tensor slot, Tensor(a!) cache, float eps) -> (Tensor, Tensor)",
    reference.latent_attention.latent_inputs,
    lambda q, key, kv, *rest: (q.new_empty((*q.shape[:2], kv.shape[1])), kv.new_empty(kv.shape)),
)
latent_attention = _define(
    "latent_attention(Tensor q, Tensor cache, Tensor block_table, Tensor seq_len, Tensor q_start, "
    "int max_q_len, float scale, int latent_size) -> Tensor",
    reference.latent_attention.latent_attention,
    lambda q, *rest: q.new_empty((*q.shape[:2], rest[-1])),
)
latent_span_attention = _define(
    "latent_span_attention(Tensor q, Tensor absorbed_q, Tensor entry, Tensor key, Tensor value, "
    "Tensor cache, Tensor block_table, Tensor seq_len, Tensor q_start, int max_q_len, float scale) "
    "-> Tensor",
    reference.latent_attention.latent_span_attention,
    lambda q, absorbed_q, entry, key, value, *rest: q.new_empty((*q.shape[:2], value.shape[1])),
)
head_linear = _define(
    "head_linear(Tensor x, Tensor weight) -> Tensor",
    reference.latent_attention.head_linear,
    lambda x, weight: x.new_empty((*x.shape[:2], weight.shape[1])),
)

linear = _define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual=None) -> Tensor",
    reference.linear.linear,
    lambda x, weight, bias, residual=None: x.new_empty((*x.shape[:-1], weight.shape[0])),
)

linear_int8 = _define(
    "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual=None) "
    "-> Tensor",
    reference.linear.linear_int8,
    lambda x, weight, scale, bias, residual=None: x.new_empty((*x.shape[:-1], weight.shape[0])),
)

packed_lookup = _define(
    "packed_lookup(Tensor row, Tensor code, Tensor scale, Tensor? offset, Tensor? table, int bits, "
    "int group, int depth, ScalarType dtype) -> Tensor",
    reference.packed.packed_lookup,
    lambda row, code, scale, offset, table, bits, group, depth, dtype: code.new_empty(
        (*row.shape, depth), dtype=dtype
    ),
)
packed_linear = _define(
    "packed_linear(Tensor x, Tensor code, Tensor scale, Tensor? offset, Tensor? table, int bits, "
    "int group, Tensor? bias, Tensor? residual=None) -> Tensor",
    reference.packed.packed_linear,
    lambda x, code, *rest: x.new_empty((*x.shape[:-1], code.shape[0])),
)
packed_expert_linear = _define(
    "packed_expert_linear(Tensor x, Tensor expert, Tensor code, Tensor scale, Tensor? offset, "
    "Tensor? table, int bits, int group) -> Tensor",
    reference.packed.packed_expert_linear,
    lambda x, expert, code, *rest: x.new_empty((*expert.shape, code.shape[1])),
)
fp8_linear = _define(
    "fp8_linear(Tensor x, Tensor weight, Tensor scale, int block_rows, int block_columns, "
    "Tensor? bias, Tensor? residual=None) -> Tensor",
    reference.packed.fp8_linear,
    lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
fp8_expert_linear = _define(
    "fp8_expert_linear(Tensor x, Tensor expert, Tensor weight, Tensor scale, int block_rows, "
    "int block_columns) -> Tensor",
    reference.packed.fp8_expert_linear,
    lambda x, expert, weight, *rest: x.new_empty((*expert.shape, weight.shape[1])),
)
ggml_lookup = _define(
    "ggml_lookup(Tensor row, Tensor block, int ggml_type, ScalarType dtype) -> Tensor",
    reference.ggml.ggml_lookup,
    lambda row, block, ggml_type, dtype: block.new_empty(
        (*row.shape, reference.ggml.depth_of(block, ggml_type)), dtype=dtype
    ),
)
ggml_linear = _define(
    "ggml_linear(Tensor x, Tensor block, int ggml_type, Tensor? bias, Tensor? residual=None) "
    "-> Tensor",
    reference.ggml.ggml_linear,
    lambda x, block, *rest: x.new_empty((*x.shape[:-1], block.shape[0])),
)
ggml_expert_linear = _define(
    "ggml_expert_linear(Tensor x, Tensor expert, Tensor block, int ggml_type) -> Tensor",
    reference.ggml.ggml_expert_linear,
    lambda x, expert, block, *rest: x.new_empty((*expert.shape, block.shape[1])),
)

linear_ = _define(
    "linear_(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? bias) -> ()",
    reference.linear.linear_,
    lambda residual, x, weight, bias: None,
)
all_reduce = _define(
    "all_reduce(Tensor x, Tensor? residual=None) -> Tensor",
    collectives.all_reduce,
    lambda x, residual=None: torch.empty_like(x, memory_format=torch.contiguous_format),
)
all_reduce_ = _define(
    "all_reduce_(Tensor(a!) x, Tensor? residual=None) -> ()",
    collectives.all_reduce_,
    lambda x, residual=None: None,
)
all_reduce_norm = _define(
    "all_reduce_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    collectives.all_reduce_norm,
    lambda x, residual, weight, eps: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
)
gather_columns = _define(
    "gather_columns(Tensor x, int num_columns) -> Tensor",
    collectives.gather_columns,
    lambda x, num_columns: x.new_empty((x.shape[0], num_columns)),
)
sample_columns = _define(
    "sample_columns(Tensor logits, Tensor temperature, Tensor seed, Tensor pos, int num_columns) "
    "-> Tensor",
    collectives.sample_columns,
    lambda logits, temperature, seed, pos, num_columns: logits.new_empty(
        logits.shape[0], dtype=torch.int64
    ),
)
shard_embedding = _define(
    "shard_embedding(Tensor token, Tensor table) -> Tensor",
    collectives.shard_embedding,
    lambda token, table: table.new_empty((*token.shape, table.shape[1])),
)
# Primitives of the ops above, for compilers that lower collectives themselves.
all_gather = _define(
    "all_gather(Tensor x, int num_ranks) -> Tensor",
    collectives.all_gather,
    lambda x, num_ranks: x.new_empty((num_ranks, *x.shape)),
)
own_rank = _define(
    "own_rank(Tensor like) -> Tensor",
    collectives.own_rank,
    lambda like: like.new_empty(1, dtype=torch.int64),
)
fused_linear = _define(
    "fused_linear(Tensor x, Tensor? norm_weight, Tensor weight, Tensor? bias, Tensor? residual, "
    "float eps, bool silu_mul) -> Tensor",
    reference.linear.fused_linear,
    lambda x, norm_weight, weight, bias, residual, eps, silu_mul: x.new_empty(
        (*x.shape[:-1], weight.shape[0] // 2 if silu_mul else weight.shape[0])
    ),
)


fused_packed_linear = _define(
    "fused_packed_linear(Tensor x, Tensor? norm_weight, Tensor code, Tensor scale, Tensor? offset, "
    "Tensor? table, int bits, int group, Tensor? bias, Tensor? residual, float eps, bool silu_mul) "
    "-> Tensor",
    reference.packed.fused_packed_linear,
    lambda x, norm_weight, code, *rest: x.new_empty(
        (*x.shape[:-1], code.shape[0] // 2 if rest[-1] else code.shape[0])
    ),
)
fused_fp8_linear = _define(
    "fused_fp8_linear(Tensor x, Tensor? norm_weight, Tensor weight, Tensor scale, int block_rows, "
    "int block_columns, Tensor? bias, Tensor? residual, float eps, bool silu_mul) -> Tensor",
    reference.packed.fused_fp8_linear,
    lambda x, norm_weight, weight, *rest: x.new_empty(
        (*x.shape[:-1], weight.shape[0] // 2 if rest[-1] else weight.shape[0])
    ),
)


class Product(NamedTuple):
    """How passes read and replace a product `op(x, *weight, bias, residual=None)`.

    The weight is in one format, whose parts are `num_weight_args` arguments.

    `fused(x, norm_weight, *weight, bias, residual, eps, silu_mul)` is the product with the ops
    around it, as in `reference.linear.fused_linear`. `in_place(residual, x, *weight, bias)` adds it
    onto the residual. They are None if there is no such op.
    """

    num_weight_args: int
    fused: Any = None
    in_place: Any = None

    def parts(self, args: Sequence[Any]) -> tuple[Any, tuple[Any, ...], Any, Any]:
        """x, weight, bias and residual of a call."""
        x, *rest = (*args, None)[: self.num_weight_args + 3]
        *weight, bias, residual = rest
        return x, tuple(weight), bias, residual


# The products of linear layers: one for each format that has an op.
PRODUCTS: dict[Any, Product] = {
    linear: Product(1, fused_linear, linear_),
    linear_int8: Product(2),
    packed_linear: Product(6, fused_packed_linear),
    fp8_linear: Product(4, fused_fp8_linear),
    ggml_linear: Product(2),
}

# The same in deterministic engines.
ordered_linear_int8 = _define_ordered("linear_int8")
ordered_packed_linear = _define_ordered("packed_linear")
ordered_fp8_linear = _define_ordered("fp8_linear")
ordered_ggml_linear = _define_ordered("ggml_linear")


adapter_tiles = _define(
    "adapter_tiles(Tensor adapter) -> (Tensor, Tensor)",
    reference.lora.adapter_tiles,
    lambda adapter: (
        torch.empty_like(adapter),
        adapter.new_empty((adapter.shape[0], 3), dtype=torch.int32),
    ),
)
# The same for products in every format: the result of one, plus what the rows' adapters add.
_LORA = "Tensor adapter, Tensor order, Tensor tile, Tensor a, Tensor b, int[] rows"
_ADD_LORA = f"Tensor x, {_LORA}"
add_lora = _define(
    f"add_lora(Tensor y, {_ADD_LORA}, Tensor? residual=None) -> Tensor",
    reference.lora.add_lora,
    lambda y, *rest: torch.empty_like(y, memory_format=torch.contiguous_format),
)
ordered_add_lora = _define_ordered("add_lora")
add_lora_ = _define(
    f"add_lora_(Tensor(a!) y, {_ADD_LORA}) -> ()", reference.lora.add_lora_, lambda y, *rest: None
)
add_lora_silu = _define(
    f"add_lora_silu(Tensor y, {_ADD_LORA}) -> Tensor",
    reference.lora.add_lora_silu,
    lambda y, *rest: y.new_empty((y.shape[0], y.shape[1] // 2)),
)
lora_linear = _define(
    "lora_linear(Tensor x, Tensor? norm_weight, Tensor weight, Tensor? bias, Tensor? residual, "
    f"float eps, bool silu_mul, {_LORA}) -> Tensor",
    reference.lora.lora_linear,
    lambda x, norm, weight, bias, residual, eps, silu_mul, *rest: x.new_empty(
        (x.shape[0], weight.shape[0] // (2 if silu_mul else 1))
    ),
)

causal_conv = _define(
    "causal_conv(Tensor x, Tensor weight, Tensor(a!) state, Tensor seq_len, Tensor q_start, "
    "Tensor from_row, Tensor? to_row=None, Tensor? to_token=None, Tensor? bias=None) -> Tensor",
    reference.gated_delta.causal_conv,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
gated_delta = _define(
    "gated_delta(Tensor qkv, Tensor ba, Tensor a_log, Tensor dt_bias, Tensor(a!) state, "
    "Tensor q_start, Tensor from_row, Tensor is_new, Tensor? to_row=None, Tensor? to_token=None) "
    "-> Tensor",
    chunked.gated_delta,
    lambda qkv, ba, a_log, dt_bias, state, *rest: qkv.new_empty(
        (qkv.shape[0], state.shape[1], state.shape[3])
    ),
)
gated_delta_step = _define(
    "gated_delta_step(Tensor qkv, Tensor z, Tensor ba, Tensor conv, Tensor a_log, Tensor dt_bias, "
    "Tensor norm, float eps, Tensor(a!) conv_state, Tensor(b!) state, Tensor seq_len, "
    "Tensor from_row, Tensor is_new, Tensor to_row) -> Tensor",
    reference.gated_delta.gated_delta_step,
    lambda qkv, z, *rest: torch.empty_like(z, memory_format=torch.contiguous_format),
)

ssd = _define(
    "ssd(Tensor xbc, Tensor dt, Tensor log_decay, Tensor(a!) state, Tensor q_start, "
    "Tensor from_row, Tensor is_new, Tensor? to_row=None, Tensor? to_token=None) -> Tensor",
    chunked_ssd.ssd,
    lambda xbc, dt, log_decay, state, *rest: dt.new_empty((*dt.shape, state.shape[3])),
)
ssd_step = _define(
    "ssd_step(Tensor xbc, Tensor dt, Tensor log_decay, Tensor(a!) state, Tensor from_row, "
    "Tensor is_new, Tensor to_row) -> Tensor",
    reference.ssd.ssd_step,
    lambda xbc, dt, log_decay, state, *rest: dt.new_empty((*dt.shape, state.shape[3])),
)


def _topk_softmax_fake(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


topk_softmax = _define(
    "topk_softmax(Tensor logits, int top_k, bool normalize) -> (Tensor, Tensor)",
    reference.experts.topk_softmax,
    _topk_softmax_fake,
)
group_topk = _define(
    "group_topk(Tensor logits, Tensor? bias, int top_k, int num_groups, int top_groups, "
    "int group_scores, bool sigmoid, bool normalize, float smallest_sum, float scale) -> "
    "(Tensor, Tensor)",
    reference.experts.group_topk,
    lambda logits, bias, top_k, *rest: _topk_softmax_fake(logits, top_k, True),
)
norm_router_topk = _define(
    "norm_router_topk(Tensor x, Tensor norm_weight, Tensor router, float eps, int top_k, "
    "bool normalize, Tensor? bias=None) -> (Tensor, Tensor, Tensor)",
    reference.experts.norm_router_topk,
    lambda x, norm_weight, router, eps, top_k, normalize, bias=None: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        *_topk_softmax_fake(x, top_k, normalize),
    ),
)
experts = _define(
    "experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor down, "
    "Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.experts.experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
ordered_experts = _define(  # of a deterministic engine
    "ordered_experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor down, "
    "Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.ordered.ordered_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
gelu_experts = _define(
    "gelu_experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor down, "
    "Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.experts.gelu_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
expert_linear = _define(
    "expert_linear(Tensor x, Tensor expert, Tensor weight) -> Tensor",
    reference.experts.expert_linear,
    lambda x, expert, weight: x.new_empty((*expert.shape, weight.shape[1])),
)
packed_experts = _define(
    "packed_experts(Tensor x, Tensor weight, Tensor expert, Tensor code, Tensor scale, "
    "Tensor? offset, Tensor? table, int bits, int group, Tensor down_code, Tensor down_scale, "
    "Tensor? down_offset, Tensor? down_table, int down_bits, int down_group, "
    "Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.packed.packed_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
fp8_experts = _define(
    "fp8_experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor scale, "
    "int block_rows, int block_columns, Tensor down, Tensor down_scale, int down_block_rows, "
    "int down_block_columns, Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.packed.fp8_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
clamped_experts = _define(
    "clamped_experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor gate_up_bias, "
    "Tensor down, Tensor down_bias, float alpha, float limit, Tensor? residual=None, "
    "Tensor? local=None) -> Tensor",
    reference.clamped.clamped_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
packed_clamped_experts = _define(
    "packed_clamped_experts(Tensor x, Tensor weight, Tensor expert, Tensor code, Tensor scale, "
    "Tensor? offset, Tensor? table, int bits, int group, Tensor gate_up_bias, Tensor down_code, "
    "Tensor down_scale, Tensor? down_offset, Tensor? down_table, int down_bits, int down_group, "
    "Tensor down_bias, float alpha, float limit, Tensor? residual=None, Tensor? local=None) "
    "-> Tensor",
    reference.clamped.packed_clamped_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
# No pass replaces these three by their meaning, which reads the routing on the host.
fetch_experts = _define(
    "fetch_experts(Tensor expert, Tensor kv_slot, int num_pad_slots, Tensor first, "
    "Tensor(a!) counters, Tensor host_gate_up, Tensor host_down, Tensor(b!) slots_gate_up, "
    "Tensor(c!) slots_down, Tensor(d!) slot, Tensor(e!) owner, Tensor(f!) stamp, Tensor(g!) clock, "
    "bool ahead=False) -> Tensor",
    reference.offload.fetch_experts,
    lambda expert, *rest, **options: torch.empty_like(
        expert, memory_format=torch.contiguous_format
    ),
)
stream_experts = _define(
    "stream_experts(Tensor first, Tensor slot, Tensor(a!) counters, Tensor host_gate_up, "
    "Tensor host_down, Tensor(b!) buffer_slot, Tensor(c!) buffer_gate_up, Tensor(d!) buffer_down) "
    "-> ()",
    reference.offload.stream_experts,
    lambda *args: None,
)
offloaded_experts = _define(
    "offloaded_experts(Tensor x, Tensor weight, Tensor expert, int num_experts, Tensor first, "
    "Tensor slot, Tensor slots_gate_up, Tensor slots_down, Tensor others_gate_up, "
    "Tensor others_down, Tensor? residual=None) -> Tensor",
    reference.offload.offloaded_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
sample = _define(
    "sample(Tensor logits, Tensor temperature, Tensor seed, Tensor pos) -> Tensor",
    reference.sample.sample,
    lambda logits, temperature, seed, pos: logits.new_empty(logits.shape[0], dtype=torch.int64),
)

apply_top_k_top_p = _define(
    "apply_top_k_top_p(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, "
    "Tensor min_p) -> Tensor",
    reference.sample.apply_top_k_top_p,
    lambda logits, temperature, top_k, top_p, min_p: torch.empty_like(logits),
)
apply_token_bitmask = _define(
    "apply_token_bitmask(Tensor logits, Tensor allowed, Tensor row) -> Tensor",
    reference.sample.apply_token_bitmask,
    lambda logits, allowed, row: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


def _decode_inputs_fake(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    table_SP: Tensor,
    row_idx_R: Tensor,
    block_size: int,
) -> tuple[Tensor, ...]:
    rows = row_idx_R.shape[0]
    return (
        *(row_idx_R.new_empty(rows) for _ in range(3)),
        table_SP.new_empty((rows, table_SP.shape[1])),
        row_idx_R.new_empty(rows, dtype=torch.int32),
        row_idx_R.new_empty(rows + 1, dtype=torch.int32),
    )


def _span_inputs_fake(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    table_SP: Tensor,
    row_idx_R: Tensor,
    num_tokens_R: Tensor,
    given_T: Tensor,
    block_size: int,
    draft_SK: Tensor | None = None,
    each: bool = False,
) -> tuple[Tensor, ...]:
    _, _, _, *per_row = _decode_inputs_fake(
        token_S, pos_S, rope_offset_S, table_SP, given_T if each else row_idx_R, block_size
    )
    return (
        *(torch.empty_like(given_T) for _ in range(3)),
        *per_row,
        *(torch.empty_like(given_T) for _ in range(2)),
        torch.empty_like(row_idx_R),
    )


decode_inputs = _define(
    "decode_inputs(Tensor token, Tensor pos, Tensor rope_offset, Tensor block_table, "
    "Tensor row_idx, int block_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.step.decode_inputs,
    _decode_inputs_fake,
)
span_inputs = _define(
    "span_inputs(Tensor token, Tensor pos, Tensor rope_offset, Tensor block_table, Tensor row_idx, "
    "Tensor num_tokens, Tensor given, int block_size, Tensor? draft=None, "
    "bool each=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.step.span_inputs,
    _span_inputs_fake,
)
store_state = _define(
    "store_state(Tensor x, Tensor(a!) state, Tensor index) -> ()",
    reference.step.store_state,
    lambda x, state, index: None,
)
sampling_inputs = _define(
    "sampling_inputs(Tensor pos, Tensor sampling, Tensor seed, Tensor row_idx, Tensor? num=None) "
    "-> (Tensor, Tensor, Tensor)",
    reference.step.sampling_inputs,
    lambda pos, sampling, seed, row_idx, num=None: (
        sampling.new_empty(row_idx.shape[0]),
        row_idx.new_empty(row_idx.shape[0]),
        row_idx.new_empty(row_idx.shape[0]),
    ),
)
accept = _define(
    "accept(Tensor fed, Tensor chosen, Tensor num_tokens, Tensor row_idx, Tensor(a!) token, "
    "Tensor(b!) pos, int num, Tensor? seed=None, int rate=0) -> (Tensor, Tensor)",
    reference.drafts.accept,
    lambda fed, chosen, num_tokens, row_idx, token, pos, num, *rest: (
        fed.new_empty((num_tokens.shape[0], num)),
        fed.new_empty(num_tokens.shape[0]),
    ),
)
next_tokens = _define(
    "next_tokens(Tensor token, Tensor pos, Tensor row_idx, Tensor fed, Tensor seq_len, "
    "Tensor q_start) -> (Tensor, Tensor)",
    reference.drafts.next_tokens,
    lambda token, pos, row_idx, fed, *rest: (torch.empty_like(fed), torch.empty_like(row_idx)),
)


def _draft_inputs_fake(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    table_SP: Tensor,
    row_idx_R: Tensor,
    num: int,
    *rest: int,
) -> tuple[Tensor, ...]:
    row_X = row_idx_R.new_empty(row_idx_R.shape[0] * num)
    made = _decode_inputs_fake(token_S, pos_S, rope_offset_S, table_SP, row_X, 0)
    return (*made, row_X, torch.empty_like(row_X))


draft_inputs = _define(
    "draft_inputs(Tensor token, Tensor pos, Tensor rope_offset, Tensor block_table, "
    "Tensor row_idx, int num, int shift, int mask_id, int block_size, int last_pos) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.drafts.draft_inputs,
    _draft_inputs_fake,
)
sample_of = _define(
    "sample_of(Tensor logits, Tensor token, int vocab_size, Tensor temperature, Tensor seed, "
    "Tensor pos) -> Tensor",
    reference.drafts.sample_of,
    lambda logits, token, *rest: token.new_empty(logits.shape[0]),
)
rms_norm_each = _define(
    "rms_norm_each(Tensor x, Tensor weight, float eps) -> Tensor",
    reference.drafts.rms_norm_each,
    lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
advance = _define(
    "advance(Tensor(a!) token, Tensor(b!) pos, Tensor row_idx, Tensor new_token, Tensor? num=None) "
    "-> ()",
    reference.step.advance,
    lambda token, pos, row_idx, new_token, num=None: None,
)
ngram_propose = _define(
    "ngram_propose(Tensor(a!) history, Tensor(b!) draft, Tensor token, Tensor pos, "
    "Tensor row_idx, int min_n, int max_n, Tensor? past=None) -> ()",
    reference.step.ngram_propose,
    lambda history, draft, token, pos, row_idx, min_n, max_n, past=None: None,
)


def register_kernels(dispatch_key: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Register kernels {op name: kernel} for one dispatch key ("CUDA", "CPU", …).

    An op keeps the first kernel that is registered for a key.
    """
    for name, kernel in kernels.items():
        if (dispatch_key, name) not in _registered:
            _library.impl(name, kernel, dispatch_key)
            _registered[dispatch_key, name] = kernel


def kernel_of(target: object, dispatch_key: str) -> Callable[..., Any] | None:
    """The kernel registered for the op in an FX node's target; None if there is none."""
    return _registered.get((dispatch_key, op_name(target) or ""))


def has_kernel(op: object, device: torch.device) -> bool:
    """True if a kernel is registered for the op and for devices of this type."""
    return kernel_of(op, device.type.upper()) is not None


def op_name(target: object) -> str | None:
    """The name of the op in an FX node's target; None if it is not an op of this library."""
    return (
        target._schema.name.split("::")[1]
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "nanovllm"
        else None
    )


__all__ = [
    "ASKED_FOR",
    "ATTENTION",
    "PRODUCTS",
    "Product",
    "accept",
    "adapter_tiles",
    "add_lora",
    "add_lora_",
    "add_lora_silu",
    "add_rms_norm",
    "advance",
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "all_reduce_norm",
    "apply_token_bitmask",
    "apply_top_k_top_p",
    "causal_conv",
    "clamped_experts",
    "decode_inputs",
    "draft_inputs",
    "expert_linear",
    "experts",
    "fetch_experts",
    "fp8_expert_linear",
    "fp8_experts",
    "fp8_linear",
    "fused_fp8_linear",
    "fused_linear",
    "fused_packed_linear",
    "gated_delta",
    "gated_delta_step",
    "gather_columns",
    "gelu_experts",
    "ggml_expert_linear",
    "ggml_linear",
    "ggml_lookup",
    "group_topk",
    "has_kernel",
    "head_linear",
    "kernel_of",
    "latent_attention",
    "latent_inputs",
    "latent_span_attention",
    "layer_norm",
    "linear",
    "linear_",
    "linear_int8",
    "lora_linear",
    "next_tokens",
    "ngram_propose",
    "norm_router_topk",
    "offloaded_experts",
    "op_name",
    "ordered_attention",
    "ordered_experts",
    "ordered_linear",
    "own_rank",
    "packed_clamped_experts",
    "packed_expert_linear",
    "packed_experts",
    "packed_linear",
    "packed_lookup",
    "paged_attention",
    "qk_norm_rope_store",
    "register_kernels",
    "rms_norm",
    "rms_norm_each",
    "rope",
    "sample",
    "sample_columns",
    "sample_of",
    "sampling_inputs",
    "segment_attention",
    "shard_embedding",
    "silu_mul",
    "span_inputs",
    "ssd",
    "ssd_step",
    "store_kv",
    "stream_experts",
    "topk_softmax",
    "varlen_attention",
    "zero_padding_",
]
