"""Small random checkpoints of hybrid decoders: Qwen3-Next and Qwen3.5, dense and with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models.families import VOCAB_SIZE, Family

# No two sizes are equal, but four key heads, which four ranks share. With larger weights
# transformers' logits differ by more than 1e-4 from those of the same formulas in fp64.
HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24, "tie_word_embeddings": False, "initializer_range": 0.1,
    "layer_types": [
        "linear_attention", "full_attention", "linear_attention", "linear_attention",
    ],
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}  # fmt: skip
LAST_IS_FULL = HYBRID["layer_types"][::-1][2:] + HYBRID["layer_types"][:2]
CASES = (
    Family("qwen3_next", "qwen3_next", {**HYBRID, **EXPERTS, "mlp_only_layers": [0]}),
    Family(
        "qwen3_5", "qwen3_5_text",
        {
            **HYBRID, "attention_bias": True, "layer_types": LAST_IS_FULL,
            "tie_word_embeddings": True,
        },
    ),
    Family("qwen3_5_moe", "qwen3_5_moe_text", {**HYBRID, **EXPERTS}),
)  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 56, "num_position_embeddings": 64,
}  # fmt: skip
SECTIONS = {
    "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    "mrope_section": [4, 2, 2],
}  # fmt: skip


def with_tower(name: str, folder: Path, **tokens: int) -> Any:
    """Save a checkpoint with a vision tower, and with layers that propose tokens, which are NaN;
    returns transformers' model. `tokens` are the ids of images' tokens."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {**HYBRID, "vocab_size": VOCAB_SIZE, "hidden_size": 56, "intermediate_size": 96,
            "rope_parameters": SECTIONS, "max_position_embeddings": 512}  # fmt: skip
    if name.endswith("moe"):
        text |= EXPERTS
    text |= {"num_hidden_layers": 2, "layer_types": HYBRID["layer_types"][:2]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, text_config=text, vision_config=VISION, tie_word_embeddings=False, **tokens
    )
    hf = AutoModelForImageTextToText.from_config(config).eval()
    for parameter_name, param in hf.named_parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, std=0.1)
        elif "norm" in parameter_name:
            adds_one = not any(part in parameter_name for part in ("linear_attn", "visual"))
            torch.nn.init.normal_(param, 0.0 if adds_one else 1.0, 0.1)
    # of equal tokens the first is chosen, so no answer has an image's token
    hf.lm_head.weight.data[80:] = hf.lm_head.weight.data[0]
    hf.save_pretrained(folder)
    path = folder / "model.safetensors"
    stored = load_file(path) | {"mtp.fc.weight": torch.full((4, 4), torch.nan)}
    save_file(stored, path, metadata={"format": "pt"})
    return hf
