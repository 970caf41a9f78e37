"""A tiny random thinker of Qwen2.5-Omni, and features of clips as transformers makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXT = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 16,
}  # fmt: skip
# a chunk has 12 frames, and 3 tokens
NUM_MELS, CHUNK_FRAMES = 10, 12
AUDIO = {
    "num_mel_bins": NUM_MELS, "encoder_layers": 2, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "d_model": 32, "n_window": CHUNK_FRAMES // 2, "output_dim": 64, "max_source_positions": 20,
}  # fmt: skip
TOKENS = {
    "audio_token_index": 88, "image_token_index": 90, "video_token_index": 91,
    "vision_start_token_id": 92, "vision_end_token_id": 93, "audio_start_token_id": 94,
    "audio_end_token_id": 95,
}  # fmt: skip


def config(**audio: Any) -> Any:
    """transformers' config of the tiny thinker."""
    from transformers import Qwen2_5OmniThinkerConfig

    return Qwen2_5OmniThinkerConfig(
        text_config=TEXT, vision_config=VISION, audio_config={**AUDIO, **audio}, **TOKENS
    )


def model(**audio: Any) -> Any:
    """transformers' model with random weights, far from its initial values."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    torch.manual_seed(0)
    made = Qwen2_5OmniThinkerForConditionalGeneration(config(**audio)).eval()
    for name, parameter in made.named_parameters():
        is_norm = any(one in name for one in ("norm", "ln_q", "ln_post"))
        is_weight = name.endswith("weight")
        mean, std = (1.0, 0.1) if is_norm and is_weight else (0.0, 0.1 if is_norm else 0.2)
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    # of equal tokens the first is chosen, so no answer has a placeholder
    made.lm_head.weight.data[80:] = made.lm_head.weight.data[0]
    return made


def save(folder: Path, **audio: Any) -> Any:
    """Save a checkpoint of the thinker alone; returns the model."""
    made = model(**audio)
    made.save_pretrained(folder)
    return made


def mels(clips: list[int], seed: int = 0) -> Tensor:
    """Random mel features [frames, M] of clips with so many frames."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(sum(clips), NUM_MELS, generator=draw)


@torch.no_grad()
def expected(made: Any, features: Tensor, clips: list[int]) -> Tensor:
    """transformers' tokens of clips, [G, O]."""
    found = made.model.audio_tower(features.T, feature_lens=torch.tensor(clips))
    tokens: Tensor = found.last_hidden_state
    return tokens
