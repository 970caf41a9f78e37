"""Qwen3-MoE (Qwen3-30B-A3B): a Qwen3 with experts in most layers."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import MoeConfig, dense_config, require_type
from nanovllm.models.layer_plan import sparse_by_step
from nanovllm.models.model import Model
from nanovllm.models.moe import QWEN_NAMES, moe_model

NAME = "Qwen3MoeForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Qwen3MoeConfig`."""
    require_type(hf, NAME, "qwen3_moe")
    moe = MoeConfig(
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        expert_size=hf.moe_intermediate_size,
        normalize=hf.norm_topk_prob,
    )
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
        moe=moe,
    )
    windows = (hf.sliding_window or 0,) * hf.num_hidden_layers
    return moe_model(config, QWEN_NAMES, sparse_by_step(hf), windows)
