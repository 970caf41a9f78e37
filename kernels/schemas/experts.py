"""Schemas of experts: how tokens choose them, and what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.schemas.registry import define


def _topk_softmax_fake(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


topk_softmax = define(
    "topk_softmax(Tensor logits, int top_k, bool normalize) -> (Tensor, Tensor)",
    reference.experts.topk_softmax,
    _topk_softmax_fake,
)
group_topk = define(
    "group_topk(Tensor logits, Tensor? bias, int top_k, int num_groups, int top_groups, "
    "int group_scores, bool sigmoid, bool normalize, float smallest_sum, float scale) -> "
    "(Tensor, Tensor)",
    reference.experts.group_topk,
    lambda logits, bias, top_k, *rest: _topk_softmax_fake(logits, top_k, True),
)
norm_router_topk = define(
    "norm_router_topk(Tensor x, Tensor norm_weight, Tensor router, float eps, int top_k, "
    "bool normalize, Tensor? bias=None) -> (Tensor, Tensor, Tensor)",
    reference.experts.norm_router_topk,
    lambda x, norm_weight, router, eps, top_k, normalize, bias=None: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        *_topk_softmax_fake(x, top_k, normalize),
    ),
)
experts = define(
    "experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor down, "
    "Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.experts.experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
ordered_experts = define(  # of a deterministic engine
    "ordered_experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor down, "
    "Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.ordered.ordered_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
gelu_experts = define(
    "gelu_experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor down, "
    "Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.experts.gelu_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
expert_linear = define(
    "expert_linear(Tensor x, Tensor expert, Tensor weight) -> Tensor",
    reference.experts.expert_linear,
    lambda x, expert, weight: x.new_empty((*expert.shape, weight.shape[1])),
)
packed_experts = define(
    "packed_experts(Tensor x, Tensor weight, Tensor expert, Tensor code, Tensor scale, "
    "Tensor? offset, Tensor? table, int bits, int group, Tensor down_code, Tensor down_scale, "
    "Tensor? down_offset, Tensor? down_table, int down_bits, int down_group, "
    "Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.packed.packed_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
fp8_experts = define(
    "fp8_experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor scale, "
    "int block_rows, int block_columns, Tensor down, Tensor down_scale, int down_block_rows, "
    "int down_block_columns, Tensor? residual=None, Tensor? local=None) -> Tensor",
    reference.packed.fp8_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
clamped_experts = define(
    "clamped_experts(Tensor x, Tensor weight, Tensor expert, Tensor gate_up, Tensor gate_up_bias, "
    "Tensor down, Tensor down_bias, float alpha, float limit, Tensor? residual=None, "
    "Tensor? local=None) -> Tensor",
    reference.clamped.clamped_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
packed_clamped_experts = define(
    "packed_clamped_experts(Tensor x, Tensor weight, Tensor expert, Tensor code, Tensor scale, "
    "Tensor? offset, Tensor? table, int bits, int group, Tensor gate_up_bias, Tensor down_code, "
    "Tensor down_scale, Tensor? down_offset, Tensor? down_table, int down_bits, int down_group, "
    "Tensor down_bias, float alpha, float limit, Tensor? residual=None, Tensor? local=None) "
    "-> Tensor",
    reference.clamped.packed_clamped_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
# No pass replaces these three by their meaning, which reads the routing on the host.
fetch_experts = define(
    "fetch_experts(Tensor expert, Tensor kv_slot, int num_pad_slots, Tensor first, "
    "Tensor(a!) counters, Tensor host_gate_up, Tensor host_down, Tensor(b!) slots_gate_up, "
    "Tensor(c!) slots_down, Tensor(d!) slot, Tensor(e!) owner, Tensor(f!) stamp, Tensor(g!) clock, "
    "bool ahead=False) -> Tensor",
    reference.offload.fetch_experts,
    lambda expert, *rest, **options: torch.empty_like(
        expert, memory_format=torch.contiguous_format
    ),
)
stream_experts = define(
    "stream_experts(Tensor first, Tensor slot, Tensor(a!) counters, Tensor host_gate_up, "
    "Tensor host_down, Tensor(b!) buffer_slot, Tensor(c!) buffer_gate_up, Tensor(d!) buffer_down) "
    "-> ()",
    reference.offload.stream_experts,
    lambda *args: None,
)
offloaded_experts = define(
    "offloaded_experts(Tensor x, Tensor weight, Tensor expert, int num_experts, Tensor first, "
    "Tensor slot, Tensor slots_gate_up, Tensor slots_down, Tensor others_gate_up, "
    "Tensor others_down, Tensor? residual=None) -> Tensor",
    reference.offload.offloaded_experts,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
