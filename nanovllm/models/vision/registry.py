"""The supported vision encoders, by the `model_type` of transformers' vision configs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from nanovllm.models.vision import gemma4, qwen2_5_omni, qwen2_5_vl, qwen3_vl, siglip
from nanovllm.models.vision.vision_encoder import Tower

TOWERS: dict[str, Callable[[Any, torch.dtype], Tower]] = {
    "siglip_vision_model": siglip.tower,
    "gemma4_vision": gemma4.tower,
    "qwen2_5_vl_vision": qwen2_5_vl.tower,
    "qwen2_5_omni_vision_encoder": qwen2_5_omni.tower,
    "qwen3_vl_vision": qwen3_vl.tower,
    "qwen3_vl_moe_vision": qwen3_vl.tower,
    "qwen3_5_vision": qwen3_vl.qwen3_5_tower,
    "qwen3_5_moe_vision": qwen3_vl.qwen3_5_tower,
}


def tower_of(hf: Any, dtype: torch.dtype) -> Tower:
    """The tower of a text model's config, which has the tower's fields as `vision_config`."""
    return tower(SimpleNamespace(**hf.vision_config), dtype)


def tower(vision: Any, dtype: torch.dtype) -> Tower:
    """The tower of a vision config. Raises ValueError for unsupported types and settings."""
    make = TOWERS.get(vision.model_type)
    if make is None:
        raise ValueError(
            f"the vision tower {vision.model_type!r} is not supported: only {', '.join(TOWERS)} are"
        )
    return make(vision, dtype)
