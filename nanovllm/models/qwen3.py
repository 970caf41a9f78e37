"""Qwen3: q and k are normalised per head before the rotation."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import ModelConfig, dense_config, windows_by_layer_type
from nanovllm.models.dense import embed, head, layer
from nanovllm.models.params import layer_params, outer_params

__all__ = ["config", "embed", "head", "layer", "layer_params", "outer_params"]


def config(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> ModelConfig:
    """The model's config from transformers' `Qwen3Config`."""
    return dense_config(
        hf,
        architecture="Qwen3ForCausalLM",
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
        layer_windows=windows_by_layer_type(hf),
    )
