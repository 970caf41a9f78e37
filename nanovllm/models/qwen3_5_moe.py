"""Qwen3.5 and Qwen3.6 with experts (35B-A3B): the hybrid decoder of `qwen3_5`."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import require_type
from nanovllm.models.model import Model
from nanovllm.models.qwen3_5 import has_tower, text_model
from nanovllm.models.qwen3_next import moe_config

NAME, WITH_TOWER = "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Qwen3_5MoeTextConfig`, which may have a `vision_config`.

    The weights of a token's experts sum to 1.
    """
    require_type(hf, NAME, "qwen3_5_moe_text")
    moe = moe_config(hf, normalize=True)
    name = WITH_TOWER if has_tower(hf) else NAME
    return text_model(hf, moe, architecture=name, dtype=dtype, max_model_len=max_model_len)
