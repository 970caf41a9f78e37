"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: experts are chosen by sigmoids and a bias, in groups.

GLM-4.7-Flash has the same router.
"""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import MoeConfig, require_type
from nanovllm.models.group_router import GroupRouter
from nanovllm.models.latent_moe import latent_config, latent_model
from nanovllm.models.layer_plan import proposing_layers, sparse_after_dense
from nanovllm.models.model import Model
from nanovllm.models.moe import BIASED_NAMES
from nanovllm.models.scaled import check_factor

NAME = "DeepseekV3ForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `DeepseekV3Config`."""
    require_type(hf, NAME, "deepseek_v3")
    config = latent_config(
        hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, moe=sigmoid_moe(hf)
    )
    is_sparse = sparse_after_dense(hf, hf.first_k_dense_replace or 0)
    return latent_model(config, BIASED_NAMES, is_sparse, proposing_layers(hf))


def sigmoid_moe(hf: Any) -> MoeConfig:
    """The experts of a config."""
    check_factor("routed_scaling_factor", hf.routed_scaling_factor)
    return MoeConfig(
        num_experts=hf.n_routed_experts,
        top_k=hf.num_experts_per_tok or 0,
        expert_size=hf.moe_intermediate_size,
        normalize=bool(hf.norm_topk_prob),
        shared_size=hf.moe_intermediate_size * (hf.n_shared_experts or 0),
        router=GroupRouter(
            num_groups=1 if hf.n_group is None else hf.n_group,
            top_groups=1 if hf.topk_group is None else hf.topk_group,
            scale=float(hf.routed_scaling_factor),
        ),
    )
