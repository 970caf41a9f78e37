"""Schemas of recurrent layers: convolutions, gated delta rule, state spaces."""

from __future__ import annotations

import torch

from nanovllm.kernels import gated_delta as chunked
from nanovllm.kernels import reference
from nanovllm.kernels import ssd as chunked_ssd
from nanovllm.kernels.schemas.registry import define

causal_conv = define(
    "causal_conv(Tensor x, Tensor weight, Tensor(a!) state, Tensor seq_len, Tensor q_start, "
    "Tensor from_row, Tensor? to_row=None, Tensor? to_token=None, Tensor? bias=None) -> Tensor",
    reference.gated_delta.causal_conv,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
gated_delta = define(
    "gated_delta(Tensor qkv, Tensor ba, Tensor a_log, Tensor dt_bias, Tensor(a!) state, "
    "Tensor q_start, Tensor from_row, Tensor is_new, Tensor? to_row=None, Tensor? to_token=None) "
    "-> Tensor",
    chunked.gated_delta,
    lambda qkv, ba, a_log, dt_bias, state, *rest: qkv.new_empty(
        (qkv.shape[0], state.shape[1], state.shape[3])
    ),
)
gated_delta_step = define(
    "gated_delta_step(Tensor qkv, Tensor z, Tensor ba, Tensor conv, Tensor a_log, Tensor dt_bias, "
    "Tensor norm, float eps, Tensor(a!) conv_state, Tensor(b!) state, Tensor seq_len, "
    "Tensor from_row, Tensor is_new, Tensor to_row) -> Tensor",
    reference.gated_delta.gated_delta_step,
    lambda qkv, z, *rest: torch.empty_like(z, memory_format=torch.contiguous_format),
)
ssd = define(
    "ssd(Tensor xbc, Tensor dt, Tensor log_decay, Tensor(a!) state, Tensor q_start, "
    "Tensor from_row, Tensor is_new, Tensor? to_row=None, Tensor? to_token=None) -> Tensor",
    chunked_ssd.ssd,
    lambda xbc, dt, log_decay, state, *rest: dt.new_empty((*dt.shape, state.shape[3])),
)
ssd_step = define(
    "ssd_step(Tensor xbc, Tensor dt, Tensor log_decay, Tensor(a!) state, Tensor from_row, "
    "Tensor is_new, Tensor to_row) -> Tensor",
    reference.ssd.ssd_step,
    lambda xbc, dt, log_decay, state, *rest: dt.new_empty((*dt.shape, state.shape[3])),
)
