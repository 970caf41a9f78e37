"""Gemma-3 with images (4B, 12B, 27B): the text model of `gemma3` and a SigLIP tower.

The tokens of an image see all of it, in layers with a window as far as the window reaches back. The
tower's features replace embeddings that have their factor already.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from nanovllm.models import gemma3
from nanovllm.models.model import Model
from nanovllm.models.vision import registry, siglip


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Gemma3Config`, of which `hf` is the text model's part."""
    text = gemma3.model(hf, dtype=dtype, max_model_len=max_model_len)
    own = {"mm_tokens_per_image": hf.mm_tokens_per_image, "out_hidden_size": hf.hidden_size}
    tower = registry.tower(SimpleNamespace(**{**hf.vision_config, **own}), dtype)
    return replace(
        text,
        config=replace(text.config, sees_ahead=True),
        tower=tower,
        read_elsewhere=siglip.ALL,
        embed_factor=1.0,
    )
