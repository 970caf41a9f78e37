"""DeepSeek-V2 and V2-Lite: experts are chosen by the softmax of their scores, in groups or not."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import MoeConfig, require_type
from nanovllm.models.group_router import GroupRouter
from nanovllm.models.latent_moe import latent_config, latent_model
from nanovllm.models.layer_plan import proposing_layers, sparse_after_dense
from nanovllm.models.model import Model
from nanovllm.models.moe import DEEPSEEK_NAMES
from nanovllm.models.scaled import check_factor

NAME = "DeepseekV2ForCausalLM"
GREEDY, GROUPED = "greedy", "group_limited_greedy"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `DeepseekV2Config`."""
    require_type(hf, NAME, "deepseek_v2")
    _refuse(hf)
    is_grouped = hf.topk_method == GROUPED
    moe = MoeConfig(
        num_experts=hf.n_routed_experts,
        top_k=hf.num_experts_per_tok or 0,
        expert_size=hf.moe_intermediate_size,
        normalize=False,
        shared_size=hf.moe_intermediate_size * (hf.n_shared_experts or 0),
        router=GroupRouter(
            "softmax",
            num_groups=hf.n_group or 1 if is_grouped else 1,
            top_groups=hf.topk_group or 1 if is_grouped else 1,
            group_scores=1,
            scale=float(hf.routed_scaling_factor),
        ),
    )
    config = latent_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, moe=moe)
    is_sparse = sparse_after_dense(hf, hf.first_k_dense_replace or 0)
    return latent_model(config, DEEPSEEK_NAMES, is_sparse, proposing_layers(hf))


def _refuse(hf: Any) -> None:
    """Raise ValueError for settings that no region computes."""
    if hf.topk_method not in (GREEDY, GROUPED):
        raise ValueError(
            f"topk_method {hf.topk_method!r} is not supported by {NAME}: only {GREEDY!r} and "
            f"{GROUPED!r} are"
        )
    check_factor("routed_scaling_factor", hf.routed_scaling_factor)
    if hf.norm_topk_prob:
        # the release divides weights by their sum and leaves out the factor; transformers does not
        raise ValueError(f"norm_topk_prob True is not supported by {NAME}: only False is")
    if hf.mlp_bias:
        raise ValueError(f"mlp_bias True is not supported by {NAME}: only False is")
