"""Mistral 3 (Mistral-Small 3.1 and 3.2, Ministral 3): the text model of checkpoints with an image
encoder. The encoder is not read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models import ministral3, mistral
from nanovllm.models.config import require_type
from nanovllm.models.model import Model

NAME = "Mistral3ForConditionalGeneration"
NOT_READ = (
    "model.vision_tower.", "vision_tower.", "model.multi_modal_projector.",
    "multi_modal_projector.",
)  # fmt: skip


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The text model of transformers' `Mistral3Config`: a `mistral` or a `ministral3`."""
    require_type(hf, NAME, "mistral", "ministral3")
    make = ministral3.model if hf.model_type == "ministral3" else mistral.model
    text = make(hf, dtype=dtype, max_model_len=max_model_len)
    return replace(text, config=replace(text.config, architecture=NAME), read_elsewhere=NOT_READ)
