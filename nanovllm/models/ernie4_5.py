"""ERNIE 4.5, dense: a Llama that rotates neighbouring elements of a head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.head_order import rotated_as_ops_do
from nanovllm.models.model import LayerKind, Model, Param

NAME = "Ernie4_5ForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Ernie4_5Config`."""
    require_type(hf, NAME, "ernie4_5")
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=bool(hf.use_bias),
        out_bias=bool(hf.use_bias),
        mlp_bias=bool(hf.use_bias),
    )
    return replace(dense.dense_model(config), layer_params=layer_params)


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """`dense.layer_params`, with the heads' rows in the order of the ops."""
    declared = dense.layer_params(cfg, kind, layer_idx)
    return rotated_as_ops_do(cfg, declared, interleaved=True)
