"""Granite: a Llama with factors on embeddings, attention scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Model
from nanovllm.models.scaled import Factors, check_factor, scaled_model

NAME = "GraniteForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `GraniteConfig`."""
    require_type(hf, NAME, "granite")
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )
    return with_factors(dense_model(config), hf)


def with_factors(plain: Model, hf: Any) -> Model:
    """A model of this family, of one without its factors."""
    for name in ("attention_multiplier", "logits_scaling"):
        check_factor(name, getattr(hf, name))
    factors = Factors(
        embed=("embedding_multiplier", hf.embedding_multiplier),
        residual=("residual_multiplier", hf.residual_multiplier),
        head=("1 / logits_scaling", 1 / hf.logits_scaling),
    )
    config = plain.config.with_attention_scale(hf.attention_multiplier)
    return scaled_model(replace(plain, config=config), factors)
