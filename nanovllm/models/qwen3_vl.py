"""Qwen3-VL: the text model is Qwen3 with three positions for each token, and with features of
images that are added after its first layers. Its form with experts is `qwen3_vl_moe`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Model
from nanovllm.models.rope import axes_in_sections
from nanovllm.models.vision.registry import tower_of
from nanovllm.models.vision.vision_encoder import PREFIXES

NAME = "Qwen3VLForConditionalGeneration"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The text model of transformers' `Qwen3VLTextConfig`."""
    require_type(hf, NAME, "qwen3_vl_text")
    config = text_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len)
    return with_tower(dense_model(config), hf)


def text_config(hf: Any, **fields: Any) -> ModelConfig:
    """The config of a text model, dense or with experts. `fields` are those of `dense_config`."""
    if not hf.rope_parameters.get("mrope_interleaved", True):
        raise ValueError("mrope_interleaved False is not supported by Qwen3-VL: only True is")
    sections = hf.rope_parameters.get("mrope_section")
    return dense_config(
        hf,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
        rope_axes=axes_in_sections(sections, interleaved=True),
        num_deepstack=len(hf.vision_config["deepstack_visual_indexes"]),
        **fields,
    )


def with_tower(text: Model, hf: Any) -> Model:
    """A text model with the tower of its checkpoint."""
    tower = tower_of(hf, text.config.dtype)
    return replace(text, read_elsewhere=PREFIXES, tower=tower)
