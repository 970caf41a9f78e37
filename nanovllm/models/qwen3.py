"""Qwen3: q and k are normalised per head before the rotation."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type, windows_by_layer_type
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Model

NAME = "Qwen3ForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Qwen3Config`."""
    require_type(hf, NAME, "qwen3")
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
    )
    return dense_model(config, windows_by_layer_type(hf))
