"""The dtype of a checkpoint whose config.json has none, such as gpt-oss's."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch

from nanovllm.models.checkpoint import DTYPES, Checkpoint
from nanovllm.models.loader import TABLE


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of the embedding table, or without one of most numbers in a floating point dtype.
    Reads headers alone. None without such numbers, or without safetensors files.

    Raises CheckpointError for a damaged file.
    """
    if not any(folder.glob("*.safetensors")):
        return None
    with Checkpoint(folder) as checkpoint:
        if TABLE in checkpoint and (found := _dtype(checkpoint, TABLE)) is not None:
            return found
        sizes: Counter[torch.dtype] = Counter()
        for name in checkpoint:
            if (dtype := _dtype(checkpoint, name)) is not None:
                sizes[dtype] += math.prod(checkpoint.shape(name))
    return sizes.most_common(1)[0][0] if sizes else None


def _dtype(checkpoint: Checkpoint, name: str) -> torch.dtype | None:
    """The dtype of a tensor, if a model can have it."""
    found = DTYPES.get(checkpoint.stored_dtype(name))
    return None if found is torch.float64 else found
