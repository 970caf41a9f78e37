"""GLM-4.5 and 4.5-Air: experts chosen by sigmoid scores and a bias, after some dense layers.

A part of each head is rotated. Layers that propose tokens are those of `mtp`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.config import ModelConfig, MoeConfig, dense_config, require_type
from nanovllm.models.group_router import GroupRouter
from nanovllm.models.head_order import rotated_as_ops_do
from nanovllm.models.layer_plan import proposing_layers, sparse_after_dense
from nanovllm.models.model import LayerKind, Model, Param
from nanovllm.models.moe import BIASED_NAMES, moe_model
from nanovllm.models.scaled import check_factor

NAME = "Glm4MoeForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Glm4MoeConfig`."""
    require_type(hf, NAME, "glm4_moe")
    check_factor("routed_scaling_factor", hf.routed_scaling_factor)
    moe = MoeConfig(
        num_experts=hf.n_routed_experts,
        top_k=hf.num_experts_per_tok,
        expert_size=hf.moe_intermediate_size,
        normalize=hf.norm_topk_prob,
        shared_size=hf.moe_intermediate_size * hf.n_shared_experts,
        router=GroupRouter(
            num_groups=hf.n_group, top_groups=hf.topk_group, scale=float(hf.routed_scaling_factor)
        ),
    )
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        partial_rotary=True,
        qkv_bias=hf.attention_bias,
        qk_norm=hf.use_qk_norm,
        moe=moe,
    )
    plain = moe_model(config, BIASED_NAMES, sparse_after_dense(hf, hf.first_k_dense_replace))
    return replace(plain, layer_params=layer_params, read_elsewhere=proposing_layers(hf))


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, with the heads' rows in the order of the ops."""
    return rotated_as_ops_do(cfg, BIASED_NAMES.layer_params(cfg, kind, layer_idx))
