"""Mel features of samples, by transformers' feature extractor of Whisper, without torchaudio.

The extractor pads every clip to its longest length, five minutes in Qwen2.5-Omni. Features of a
frame depend on the samples near it, and on the largest feature, which never comes from silence. So
clips are padded only with the silence within the window of their last frame.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from nanovllm.media.settings import AudioSettings
from nanovllm.media.sounds import Samples


def num_frames(num_samples: int, settings: AudioSettings) -> int:
    return -(-num_samples // settings.hop_length)


def num_tokens(frames: int) -> int:
    """`_get_feat_extract_output_lengths` of transformers' processor."""
    return ((frames - 1) // 2 - 1) // 2 + 1


def features(samples: Samples, settings: AudioSettings) -> np.ndarray[Any, Any]:
    """The mel features [frames, mel bins], float32.

    Raises ValueError for too few samples for one token.
    """
    frames, hop = num_frames(len(samples), settings), settings.hop_length
    if num_tokens(frames) < 1:
        raise ValueError(f"it has {len(samples)} samples: at least {2 * hop + 1} are needed")
    padded = (frames + -(-settings.n_fft // hop)) * hop
    found = _extractor(settings)(
        samples, sampling_rate=settings.sampling_rate, padding="max_length",
        max_length=min(padded, settings.max_samples), return_attention_mask=False,
        return_tensors="np",
    )  # fmt: skip
    return np.ascontiguousarray(found["input_features"][0, :, :frames].T, dtype=np.float32)


@lru_cache(maxsize=4)
def _extractor(settings: AudioSettings) -> Any:
    from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

    return WhisperFeatureExtractor(
        feature_size=settings.feature_size, sampling_rate=settings.sampling_rate,
        hop_length=settings.hop_length, chunk_length=settings.chunk_length, n_fft=settings.n_fft,
    )  # fmt: skip
