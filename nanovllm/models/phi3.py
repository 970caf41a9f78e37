"""Phi-3, Phi-3.5 and Phi-4: a Llama whose checkpoint joins q, k and v, and gate and up.

Phi-4-mini rotates a part of each head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.head_order import rotated_as_ops_do
from nanovllm.models.model import LayerKind, Model, Param

NAME = "Phi3ForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Phi3Config`."""
    require_type(hf, NAME, "phi3")
    config = dense_config(
        hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, partial_rotary=True
    )
    plain = dense.dense_model(config, (hf.sliding_window or 0,) * hf.num_hidden_layers)
    return replace(plain, layer_params=layer_params)


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """`dense.layer_params`, where one tensor may have all sources of a parameter."""
    declared = dense.layer_params(cfg, kind, layer_idx)
    prefix = f"model.layers.{layer_idx}."
    joined = {"qkv_ED": "self_attn.qkv_proj.weight", "gate_up_GD": "mlp.gate_up_proj.weight"}
    for name, source in joined.items():
        declared[name] = declared[name]._replace(other_name=prefix + source)
    return rotated_as_ops_do(cfg, declared)
