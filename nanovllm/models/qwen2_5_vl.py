"""Qwen2.5-VL: the text model is Qwen2 with three positions for each token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type, windows_by_layer_type
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Model
from nanovllm.models.rope import axes_in_sections
from nanovllm.models.vision.registry import tower_of
from nanovllm.models.vision.vision_encoder import PREFIXES

NAME = "Qwen2_5_VLForConditionalGeneration"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The text model of transformers' `Qwen2_5_VLTextConfig`."""
    require_type(hf, NAME, "qwen2_5_vl_text")
    text = text_model(hf, NAME, dtype, max_model_len)
    return replace(text, read_elsewhere=PREFIXES, tower=tower_of(hf, dtype))


def text_model(hf: Any, architecture: str, dtype: torch.dtype, max_model_len: int | None) -> Model:
    """Qwen2 with three positions for each token, without towers."""
    sections = hf.rope_parameters.get("mrope_section")
    config = dense_config(
        hf,
        architecture=architecture,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=True,
        rope_axes=axes_in_sections(sections, interleaved=False),
    )
    return dense_model(config, windows_by_layer_type(hf))
