"""SmolLM3: a Llama in which some layers, such as every fourth, have no rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type, windows_by_layer_type
from nanovllm.models.dense import dense_model
from nanovllm.models.layer_ropes import with_still_layers
from nanovllm.models.model import Model

NAME = "SmolLM3ForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `SmolLM3Config`.

    `no_rope_layers` has a 1 for each layer that rotates.
    """
    require_type(hf, NAME, "smollm3")
    rotates = hf.no_rope_layers[: hf.num_hidden_layers]
    if len(rotates) < hf.num_hidden_layers:
        raise ValueError(
            f"no_rope_layers has {len(rotates)} entries for {hf.num_hidden_layers} layers"
        )
    windows = windows_by_layer_type(hf)
    if any(windows) and not hf.use_sliding_window:
        raise ValueError(
            "use_sliding_window False with layer_types 'sliding_attention' is not supported"
        )
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )
    config, ropes = with_still_layers(config, rotates)
    return dense_model(config, windows, ropes)
