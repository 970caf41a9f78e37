"""Tiny random checkpoints with vision towers, and the features that transformers makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Patches that programs of tiny towers are compiled for. Tests share them, because towers with equal
# blocks then share programs.
BUDGETS = (64, 256)
TEXT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
}
VISION = {
    "depth": 5,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
TOWERS: dict[str, dict[str, Any]] = {
    # a window has 3 · 3 tokens, so that frames are no multiples of windows
    "qwen2_5_vl": {"window_size": 27, "fullatt_block_indexes": [1, 4]},
    # deepstack levels are not in the middle only, and the table is smaller and larger than frames
    "qwen3_vl": {"num_position_embeddings": 49, "deepstack_visual_indexes": [0, 2, 4]},
}
TOKENS = {
    "image_token_id": 151,
    "video_token_id": 152,
    "vision_start_token_id": 153,
    "vision_end_token_id": 154,
}


def config(name: str, **vision: Any) -> Any:
    """transformers' config of a tiny model."""
    from transformers import AutoConfig

    vision = {**VISION, **TOWERS[name], **vision}
    return AutoConfig.for_model(
        name, text_config=TEXT, vision_config=vision, tie_word_embeddings=False, **TOKENS
    )


def model(name: str, **vision: Any) -> Any:
    """transformers' model with random weights, far from its initial values."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(config(name, **vision)).eval()
    for parameter_name, parameter in made.named_parameters():
        is_norm = "norm" in parameter_name or "ln_q" in parameter_name
        is_weight = parameter_name.endswith("weight")
        mean, std = (1.0, 0.1) if is_norm and is_weight else (0.0, 0.1 if is_norm else 0.2)
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    return made


def save(folder: Path, name: str, *, original: bool = True, **vision: Any) -> Any:
    """Save a checkpoint, in the names of the model's release or of transformers; returns the
    model."""
    made = model(name, **vision)
    made.save_pretrained(folder, save_original_format=original)
    return made


def patches(grids: list[tuple[int, int, int]], numbers: int = 96) -> Tensor:
    """Random patches [patches, C] of images or videos."""
    generator = torch.Generator().manual_seed(len(grids))
    num = sum(frames * rows * columns for frames, rows, columns in grids)
    return torch.randn(num, numbers, generator=generator)


@torch.no_grad()
def expected(made: Any, pixels: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
    """transformers' features [L, G, O]: the embeddings, then the levels of deepstack."""
    tower = made.model.visual
    found = tower(pixels.to(tower.dtype), torch.tensor(grids))
    levels = getattr(found, "deepstack_features", None) or []
    return torch.stack((found.pooler_output, *levels))
