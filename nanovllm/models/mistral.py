"""Mistral: a Llama whose every layer may see only the newest `sliding_window` positions."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import ModelConfig, dense_config
from nanovllm.models.dense import embed, head, layer
from nanovllm.models.params import layer_params, outer_params

__all__ = ["config", "embed", "head", "layer", "layer_params", "outer_params"]


def config(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> ModelConfig:
    """The model's config from transformers' `MistralConfig`."""
    return dense_config(
        hf,
        architecture="MistralForCausalLM",
        dtype=dtype,
        max_model_len=max_model_len,
        layer_windows=(hf.sliding_window or 0,) * hf.num_hidden_layers,
    )
