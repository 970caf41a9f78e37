"""Seed-OSS: a Llama with biases of its own choice."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Model

NAME = "SeedOssForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `SeedOssConfig`."""
    require_type(hf, NAME, "seed_oss")
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_out_bias,
        mlp_bias=hf.mlp_bias,
    )
    return dense_model(config)
