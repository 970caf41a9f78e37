"""Mixtral: a Mistral whose layers have experts in place of the MLP."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import MoeConfig, dense_config, require_type
from nanovllm.models.model import Model
from nanovllm.models.moe import ExpertNames, moe_model

NAME = "MixtralForCausalLM"
NAMES = ExpertNames(
    router="block_sparse_moe.gate.weight",
    one="block_sparse_moe.experts.{expert}.{matrix}.weight",
    gate="w1",
    up="w3",
    down="w2",
    other_router="mlp.gate.weight",
)


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `MixtralConfig`."""
    require_type(hf, NAME, "mixtral")
    moe = MoeConfig(
        num_experts=hf.num_local_experts,
        top_k=hf.num_experts_per_tok,
        expert_size=hf.intermediate_size,
        normalize=True,
    )
    config = dense_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, moe=moe)
    num_layers = hf.num_hidden_layers
    return moe_model(config, NAMES, (True,) * num_layers, (hf.sliding_window or 0,) * num_layers)
