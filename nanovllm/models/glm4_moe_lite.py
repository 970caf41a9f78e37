"""GLM-4.7-Flash: a small DeepSeek-V3 whose config names the layers with experts."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import require_type
from nanovllm.models.deepseek_v3 import sigmoid_moe
from nanovllm.models.latent_moe import latent_config, latent_model
from nanovllm.models.layer_plan import proposing_layers
from nanovllm.models.model import Model
from nanovllm.models.moe import BIASED_NAMES

NAME = "Glm4MoeLiteForCausalLM"
SPARSE, DENSE = "sparse", "dense"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Glm4MoeLiteConfig`."""
    require_type(hf, NAME, "glm4_moe_lite")
    config = latent_config(
        hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, moe=sigmoid_moe(hf)
    )
    return latent_model(config, BIASED_NAMES, _sparse_layers(hf), proposing_layers(hf))


def _sparse_layers(hf: Any) -> tuple[bool, ...]:
    """For each layer, whether it has experts, by `mlp_layer_types`. Raises ValueError for another
    `first_k_dense_replace`, which releases have too and transformers does not read."""
    types = list(hf.mlp_layer_types)
    if len(types) != hf.num_hidden_layers or not set(types) <= {SPARSE, DENSE}:
        raise ValueError(
            f"mlp_layer_types is {types}: it must have {SPARSE!r} or {DENSE!r} for each of the "
            f"{hf.num_hidden_layers} layers"
        )
    num_dense = [*types, SPARSE].index(SPARSE)
    if (found := getattr(hf, "first_k_dense_replace", num_dense)) != num_dense:
        raise ValueError(
            f"first_k_dense_replace is {found}, but mlp_layer_types begins with {num_dense} dense "
            "layer(s)"
        )
    return tuple(one == SPARSE for one in types)
