"""ERNIE 4.5 with experts: chosen by softmax scores plus a bias, beside a shared expert.

The layers that propose tokens (MTP) are not read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.config import ModelConfig, MoeConfig, dense_config, require_type
from nanovllm.models.group_router import GroupRouter
from nanovllm.models.head_order import rotated_as_ops_do
from nanovllm.models.model import LayerKind, Model, Param
from nanovllm.models.moe import DEEPSEEK_NAMES, moe_model
from nanovllm.models.scaled import check_factor

NAME = "Ernie4_5_MoeForCausalLM"
NAMES = DEEPSEEK_NAMES._replace(router_bias="mlp.moe_statics.e_score_correction_bias")


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Ernie4_5_MoeConfig`."""
    require_type(hf, NAME, "ernie4_5_moe")
    if hf.use_bias:
        raise ValueError(f"use_bias {hf.use_bias} is not supported by {NAME}: only False is")
    check_factor("moe_norm_min", hf.moe_norm_min)
    moe = MoeConfig(
        num_experts=hf.moe_num_experts,
        top_k=hf.moe_k,
        expert_size=hf.moe_intermediate_size,
        normalize=True,
        shared_size=hf.moe_intermediate_size * hf.moe_num_shared_experts,
        router=GroupRouter("softmax", smallest_sum=float(hf.moe_norm_min)),
    )
    config = dense_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, moe=moe)
    plain = moe_model(config, NAMES, _sparse_layers(hf))
    return replace(plain, layer_params=layer_params, read_elsewhere=("model.mtp_",))


def _sparse_layers(hf: Any) -> tuple[bool, ...]:
    """For each layer, whether it has experts."""
    interval, num_layers = hf.moe_layer_interval, hf.num_hidden_layers
    if interval < 1:
        raise ValueError(f"moe_layer_interval is {interval}: it must be at least 1")
    last = num_layers - 1 if hf.moe_layer_end_index == -1 else hf.moe_layer_end_index
    sparse = range(hf.moe_layer_start_index, last + 1)
    return tuple(idx in sparse and (idx + 1) % interval == 0 for idx in range(num_layers))


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer. Neighbouring elements of a head are rotated, and the bias of
    the router is one row."""
    declared = rotated_as_ops_do(cfg, NAMES.layer_params(cfg, kind, layer_idx), interleaved=True)
    if kind.sparse:
        bias = declared["router_bias_E"]
        declared["router_bias_E"] = bias._replace(shape=(1, *bias.shape), parts=(1,))
    return declared
