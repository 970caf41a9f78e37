"""From the lengths of clips to a tower's inputs, on the host. Letters are in `interface`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The frames of a clip that make its first token; each further token takes 4 more.
MIN_FRAMES = 3


class Chunks(NamedTuple):
    """The chunks of several clips in order; int64, one number for each chunk.

    `first` is a chunk's first frame among the frames of all clips.
    """

    first: np.ndarray
    frames: np.ndarray


def num_tokens(num_frames: int) -> int:
    """The tokens of a clip: half of its positions after the convolutions, rounded down."""
    return (num_frames + 1) // 2 // 2


def chunks(clips: Sequence[int], chunk_frames: int) -> Chunks:
    """The chunks of clips of these lengths. Raises ValueError for a clip without a token."""
    short = [num for num in clips if num < MIN_FRAMES]
    if short:
        raise ValueError(f"a clip has {short[0]} frames of features: at least {MIN_FRAMES}")
    first: list[int] = []
    frames: list[int] = []
    begin = 0
    for num in clips:
        starts = range(0, num, chunk_frames)
        first += [begin + start for start in starts]
        frames += [min(num - start, chunk_frames) for start in starts]
        begin += num
    return Chunks(np.array(first, np.int64), np.array(frames, np.int64))


def starts(frames_K: np.ndarray, positions: int) -> np.ndarray:
    """The first positions of all segments, then the end of the last, int32 [S]: each chunk has one
    segment of frames and one of padding."""
    begin_K = np.arange(len(frames_K), dtype=np.int32) * positions
    end_K = begin_K + ((frames_K + 1) // 2).astype(np.int32)
    start_K2 = np.stack((begin_K, end_K), axis=1)
    return np.append(start_K2.ravel(), np.int32(len(frames_K) * positions))


def tokens(frames_K: np.ndarray, positions: int) -> np.ndarray:
    """The indices of the clips' tokens among the tokens of all chunks, int64."""
    counts_K = (frames_K + 1) // 2 // 2
    begin_K = np.arange(len(frames_K)) * (positions // 2)
    runs = [np.arange(begin, begin + num) for begin, num in zip(begin_K, counts_K)]
    return np.concatenate(runs).astype(np.int64)
