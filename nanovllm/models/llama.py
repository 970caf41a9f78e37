"""Llama 1B to 3.x: dense, no qk norm, biases only where the config asks for them."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import ModelConfig, dense_config
from nanovllm.models.dense import embed, head, layer
from nanovllm.models.params import layer_params, outer_params

__all__ = ["config", "embed", "head", "layer", "layer_params", "outer_params"]


def config(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> ModelConfig:
    """The model's config from transformers' `LlamaConfig`."""
    return dense_config(
        hf,
        architecture="LlamaForCausalLM",
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )
