"""Qwen3-VL: the text model is Qwen3 with three positions for each token, and with features of
images that are added after its first layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type
from nanovllm.models.dense import dense_model
from nanovllm.models.interface import Model
from nanovllm.models.rope import axes_in_sections
from nanovllm.models.vision.interface import PREFIXES
from nanovllm.models.vision.registry import tower_of

NAME = "Qwen3VLForConditionalGeneration"
NUM_ADDED = 3  # the tower's deepstack features


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The text model of transformers' `Qwen3VLTextConfig`."""
    require_type(hf, NAME, "qwen3_vl_text")
    sections = hf.rope_parameters["mrope_section"]
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
        rope_axes=axes_in_sections(sections, interleaved=True),
        num_added=NUM_ADDED,
    )
    return replace(dense_model(config), read_elsewhere=PREFIXES, tower=tower_of(hf, dtype))
