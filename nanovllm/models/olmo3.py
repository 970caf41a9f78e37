"""OLMo-3: an OLMo-2 with windows in most layers. Layers with windows have a rotary table of their
own, which no rope type extends."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import require_type, windows_by_layer_type
from nanovllm.models.dense import dense_model
from nanovllm.models.layer_ropes import config_with_ropes, layer_ropes
from nanovllm.models.model import Model
from nanovllm.models.olmo2 import olmo_model

NAME = "Olmo3ForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Olmo3Config`."""
    require_type(hf, NAME, "olmo3")
    config = config_with_ropes(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
    )
    return olmo_model(dense_model(config, windows_by_layer_type(hf), layer_ropes(hf)))
