"""The vision tower of Qwen2.5-Omni: Qwen2.5-VL's, whose queries, keys and values are three products
in the checkpoint. Letters are in `interface`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.model import Param
from nanovllm.models.vision import qwen2_5_vl
from nanovllm.models.vision.vision_encoder import Tower, TowerConfig


def tower(vision: Any, dtype: torch.dtype) -> Tower:
    """The tower of transformers' `Qwen2_5OmniVisionEncoderConfig`."""
    return replace(qwen2_5_vl.tower(vision, dtype), block_params=block_params)


def block_params(cfg: TowerConfig, block_idx: int) -> dict[str, Param]:
    """Parameters of one block, by the fields of `qwen2_5_vl.Block`."""
    sources = [f"blocks.{block_idx}.attn.{name}" for name in "qkv"]
    weights, biases = (tuple(f"{one}.{kind}" for one in sources) for kind in ("weight", "bias"))
    hidden = cfg.hidden_size
    return {
        **qwen2_5_vl.block_params(cfg, block_idx),
        "qkv_ED": Param.stack("linear", weights, (hidden,) * 3, hidden),
        "qkv_bias_E": Param.stack("bias", biases, (hidden,) * 3),
    }
