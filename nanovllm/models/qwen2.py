"""Qwen2 and Qwen2.5: biased q, k and v; sliding windows on the upper layers where the config asks for them."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import ModelConfig, dense_config, windows_by_layer_type
from nanovllm.models.dense import embed, head, layer
from nanovllm.models.params import layer_params, outer_params

__all__ = ["config", "embed", "head", "layer", "layer_params", "outer_params"]


def config(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> ModelConfig:
    """The model's config from transformers' `Qwen2Config`."""
    return dense_config(
        hf,
        architecture="Qwen2ForCausalLM",
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=True,
        layer_windows=windows_by_layer_type(hf),
    )
