"""Granite with experts, one of which all tokens share."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.config import require_type
from nanovllm.models.granitemoe import granite_moe
from nanovllm.models.model import Model

NAME = "GraniteMoeSharedForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `GraniteMoeSharedConfig`."""
    require_type(hf, NAME, "granitemoeshared")
    shared_size = hf.shared_intermediate_size
    return granite_moe(hf, shared_size, architecture=NAME, dtype=dtype, max_model_len=max_model_len)
