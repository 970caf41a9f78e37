"""Qwen2 and Qwen2.5: biased q, k and v; sliding windows on the layers that the config names."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type, windows_by_layer_type
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Model

NAME = "Qwen2ForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Qwen2Config`."""
    require_type(hf, NAME, "qwen2")
    config = dense_config(
        hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, qkv_bias=True
    )
    return dense_model(config, windows_by_layer_type(hf))
