"""Mistral: a Llama whose layers attend only to the newest `sliding_window` positions."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type, windows_by_layer_type
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Model

NAME = "MistralForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `MistralConfig`.

    With `layer_types`, transformers reads the config as a `MinistralConfig`: the window is that of
    the layers of type "sliding_attention" alone.
    """
    require_type(hf, NAME, "mistral", "ministral")
    config = dense_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len)
    if getattr(hf, "layer_types", None):
        return dense_model(config, windows_by_layer_type(hf))
    return dense_model(config, (hf.sliding_window or 0,) * hf.num_hidden_layers)
