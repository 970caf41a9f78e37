"""Qwen2.5-Omni's thinker: the text model of Qwen2.5-VL, its vision encoder, and an audio encoder.

The speech parts, talker and token2wav, are not read.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from nanovllm.models import qwen2_5_vl
from nanovllm.models.audio import audio_encoder as audio
from nanovllm.models.audio.qwen2_5_omni import NAME
from nanovllm.models.audio.qwen2_5_omni import tower as audio_tower
from nanovllm.models.config import require_type
from nanovllm.models.model import Model
from nanovllm.models.vision import vision_encoder as vision
from nanovllm.models.vision.registry import tower_of

SPEAKING = ("talker.", "token2wav.")


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The text model of transformers' `Qwen2_5OmniTextConfig`."""
    require_type(hf, NAME, "qwen2_5_omni_text")
    tower = tower_of(hf, dtype)
    per_second = float(hf.position_id_per_seconds)
    timed = replace(tower.config, tokens_per_second=per_second, videos_span_time=True)
    return replace(
        qwen2_5_vl.text_model(hf, NAME, dtype, max_model_len),
        read_elsewhere=(*vision.PREFIXES, *audio.PREFIXES, *SPEAKING),
        tower=replace(tower, config=timed),
        audio_tower=audio_tower(SimpleNamespace(**hf.audio_config), dtype),
    )
