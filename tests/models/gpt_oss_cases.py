"""Small random checkpoints of gpt-oss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import save_tiny
from tests.models import int4_format
from tests.models.packers import mxfp4
from tests.models.routes import edit

NAME, MODEL_TYPE = "GptOssForCausalLM", "gpt_oss"
VOCAB_SIZE = 99
# no two sizes are equal, to show code that confuses them
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "sliding_window": 17,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}


def save(folder: Path, **changes: Any) -> Path:
    """A checkpoint in the model's dtype, whose sinks and biases change the logits."""
    save_tiny(folder, MODEL_TYPE, **{**SIZES, **changes})
    return edit(folder, draw)


def draw(weights: dict[str, Tensor]) -> None:
    """Larger sinks; biases of experts, whose names end in other words than those of others; and
    numbers beyond the limit of the activation."""
    for name, weight in weights.items():
        if name.endswith("sinks"):
            torch.nn.init.normal_(weight, mean=1.0, std=2.0)
        elif name.endswith("_bias"):
            torch.nn.init.normal_(weight, std=2.0)


def save_mxfp4(folder: Path, **changes: Any) -> Path:
    """A checkpoint with experts in MXFP4; beside it, in "real", one with their numbers in the
    model's dtype."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    save(folder, **{**sizes, **changes})
    stored = load_file(folder / "model.safetensors")
    matrices = {name for name in stored if name.endswith(("gate_up_proj", "down_proj"))}

    def transposed(weights: dict[str, Tensor]) -> None:
        for name in matrices:
            weights[name] = weights[name].mT.contiguous()

    edit(folder, transposed)  # `write` packs matrices [E, O, D]
    config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    packed = int4_format.write(
        folder, folder / "packed", lambda name: name in matrices,
        lambda weight: mxfp4(weight, interleaved=False), config,
    )  # fmt: skip
    edit(packed / "real", transposed)
    return packed
