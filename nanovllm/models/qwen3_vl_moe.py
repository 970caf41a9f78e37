"""Qwen3-VL with experts (Qwen3-VL-30B-A3B): Qwen3-VL's text model, experts in most layers."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import MoeConfig, require_type
from nanovllm.models.layer_plan import sparse_by_step
from nanovllm.models.model import Model
from nanovllm.models.moe import QWEN_NAMES, moe_model
from nanovllm.models.qwen3_vl import text_config, with_tower

NAME = "Qwen3VLMoeForConditionalGeneration"
# The release has the experts' matrices transposed, and transformers 5 saves them as they are.
NAMES = QWEN_NAMES._replace(may_be_transposed=True)


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The text model of transformers' `Qwen3VLMoeTextConfig`, whose experts' weights sum to 1."""
    require_type(hf, NAME, "qwen3_vl_moe_text")
    moe = MoeConfig(
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        expert_size=hf.moe_intermediate_size,
        normalize=True,
    )
    config = text_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, moe=moe)
    return with_tower(moe_model(config, NAMES, sparse_by_step(hf)), hf)
