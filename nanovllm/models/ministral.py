"""Ministral (8B, 2410): a Mistral in which the config names the layers with a window."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type, windows_by_layer_type
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Model

NAME = "MinistralForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `MinistralConfig`."""
    require_type(hf, NAME, "ministral")
    config = dense_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len)
    return dense_model(config, windows_by_layer_type(hf))
