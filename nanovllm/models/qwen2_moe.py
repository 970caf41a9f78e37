"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): a Qwen2 with experts, one of which all tokens share."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import MoeConfig, dense_config, require_type, windows_by_layer_type
from nanovllm.models.layer_plan import sparse_by_step
from nanovllm.models.model import Model
from nanovllm.models.moe import QWEN_NAMES, moe_model

NAME = "Qwen2MoeForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Qwen2MoeConfig`."""
    require_type(hf, NAME, "qwen2_moe")
    moe = MoeConfig(
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        expert_size=hf.moe_intermediate_size,
        normalize=hf.norm_topk_prob,
        shared_size=hf.shared_expert_intermediate_size,
    )
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.qkv_bias,
        moe=moe,
    )
    return moe_model(config, QWEN_NAMES, sparse_by_step(hf), windows_by_layer_type(hf))
