"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: experts are chosen by sigmoids and a bias, in groups.

GLM-4.7-Flash has the same router.
"""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import require_type
from nanovllm.models.grouped_moe import GroupedMoeConfig
from nanovllm.models.latent_moe import latent_config, latent_model, num_predicting, sparse_from
from nanovllm.models.model import Model

NAME = "DeepseekV3ForCausalLM"
# Fields of the releases, which transformers does not read, and their only values.
ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `DeepseekV3Config`."""
    require_type(hf, NAME, "deepseek_v3")
    config = latent_config(
        hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, moe=sigmoid_moe(hf, NAME)
    )
    return latent_model(config, sparse_from(hf, hf.first_k_dense_replace or 0), num_predicting(hf))


def sigmoid_moe(hf: Any, architecture: str) -> GroupedMoeConfig:
    """The experts of a config. A group's score is the sum of its two best. Raises ValueError for
    another router."""
    for name, value in ROUTER.items():
        if (found := getattr(hf, name, value)) != value:
            raise ValueError(
                f"{name} {found!r} is not supported by {architecture}: only {value!r} is"
            )
    return GroupedMoeConfig(
        num_experts=hf.n_routed_experts,
        top_k=hf.num_experts_per_tok or 0,
        expert_size=hf.moe_intermediate_size,
        normalize=bool(hf.norm_topk_prob),
        shared_size=hf.moe_intermediate_size * (hf.n_shared_experts or 0),
        is_sigmoid=True,
        has_bias=True,
        num_groups=1 if hf.n_group is None else hf.n_group,
        top_groups=1 if hf.topk_group is None else hf.topk_group,
        group_scores=2,
        factor=hf.routed_scaling_factor,
    )
