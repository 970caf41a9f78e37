"""Qwen3.5 and Qwen3.6, dense: a hybrid decoder whose checkpoint has the inputs of the delta rule
part by part, and perhaps a vision tower. Their form with experts is `qwen3_5_moe`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.config import MoeConfig, require_type
from nanovllm.models.hybrid import DeltaRule, HybridNames, hybrid_model, three
from nanovllm.models.model import Model, Param
from nanovllm.models.qwen3_next import delta_rule, text_config
from nanovllm.models.rope import axes_in_sections
from nanovllm.models.vision.registry import tower_of
from nanovllm.models.vision.vision_encoder import PREFIXES

NAME, WITH_TOWER = "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"
SECTIONS = (11, 11, 10)  # of transformers, for configs without mrope_section


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Qwen3_5TextConfig`, which may have a `vision_config`."""
    require_type(hf, NAME, "qwen3_5_text")
    name = WITH_TOWER if has_tower(hf) else NAME
    return text_model(hf, architecture=name, dtype=dtype, max_model_len=max_model_len)


def has_tower(hf: Any) -> bool:
    """True for the config of a text model whose checkpoint has a vision tower."""
    return hasattr(hf, "vision_config")


def text_model(hf: Any, moe: MoeConfig | None = None, **settings: Any) -> Model:
    """A text model, dense or with experts in all layers, with the tower of its checkpoint if there
    is one; `settings` are those of `dense_config`.

    The positions of a text in time, height and width are equal, so that mrope_section changes
    nothing without a tower.
    """
    if has_tower(hf):
        settings["rope_axes"] = rope_axes(hf)
    if moe is not None:  # no layer is dense
        settings["ffn_size"] = moe.expert_size
    config = text_config(hf, moe=moe, **settings)
    is_sparse = (moe is not None,) * hf.num_hidden_layers
    text = hybrid_model(config, delta_rule(hf), NAMES, hf.layer_types, is_sparse)
    tower = tower_of(hf, config.dtype) if has_tower(hf) else None
    return replace(text, read_elsewhere=(*text.read_elsewhere, *PREFIXES), tower=tower)


def rope_axes(hf: Any) -> tuple[int, ...]:
    """Which of a token's positions turns each frequency. Raises ValueError."""
    if not hf.rope_parameters.get("mrope_interleaved", True):
        raise ValueError("mrope_interleaved False is not supported by Qwen3.5: only True is")
    return axes_in_sections(hf.rope_parameters.get("mrope_section", SECTIONS), interleaved=True)


def inputs(delta: DeltaRule, hidden: int, prefix: str) -> dict[str, Param]:
    """[q | k | v], and [z | b | a]."""
    joined, heads = prefix + "in_proj_qkv.weight", delta.num_value_heads
    shape = (sum(delta.channels), hidden)
    gates = tuple(f"{prefix}in_proj_{name}.weight" for name in "zba")
    return {
        "channels_ED": Param(
            "linear", shape, three(joined), delta.channels, 0, joined, units=delta.units
        ),
        "gates_JD": Param.stack("linear", gates, (delta.values, heads, heads), hidden)._replace(
            units=(heads,) * 3
        ),
    }


NAMES = HybridNames(inputs)
