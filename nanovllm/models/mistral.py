"""Mistral: a Llama in which every layer sees only the newest `sliding_window` positions."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import dense_config
from nanovllm.models.dense import dense_model
from nanovllm.models.interface import Model


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `MistralConfig`."""
    config = dense_config(
        hf, architecture="MistralForCausalLM", dtype=dtype, max_model_len=max_model_len
    )
    return dense_model(config, (hf.sliding_window or 0,) * hf.num_hidden_layers)
