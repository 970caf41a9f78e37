"""Command R7B and Command A: a Command R in which layers have windows, and layers without one
rotate nothing."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.cohere import cohere_config, cohere_model
from nanovllm.models.config import require_type, windows_by_layer_type
from nanovllm.models.dense import dense_model
from nanovllm.models.layer_ropes import with_still_layers
from nanovllm.models.model import Model

NAME = "Cohere2ForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Cohere2Config`."""
    require_type(hf, NAME, "cohere2")
    windows = windows_by_layer_type(hf)
    config = cohere_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len)
    config, ropes = with_still_layers(config, [bool(window) for window in windows])
    return cohere_model(dense_model(config, windows, ropes), hf)
