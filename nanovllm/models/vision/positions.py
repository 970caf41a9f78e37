"""Locates images and videos in a prompt, and computes its positions in time, rows and columns.

M-RoPE (Wang et al. 2024, https://arxiv.org/abs/2409.12191) gives each token three positions. A text
token has three equal ones. The tokens of an image have those of its first token plus their place
in time, row and column; the text continues after the larger of the rows and columns. In decoding a
token's three positions are its index plus the prompt's `delta`.

Audio has the positions of text, one for each token, so clips are not items here.

All is computed as transformers does it (`get_rope_index`). T tokens | G tokens of an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Grid = Sequence[int]  # (frames, rows, columns) in patches
IMAGE, VIDEO = "image", "video"


class Item(NamedTuple):
    """An image, a video, or one frame of a video: one run of placeholder tokens.

    `start` is the index of its first token in the prompt. `frames`, `rows` and `columns` count
    tokens. Between two frames lie `interval` · `per_unit` positions in time. With `spans_time` the
    text also continues after its last position in time, if that is the largest.
    """

    start: int
    frames: int
    rows: int
    columns: int
    interval: float = 1.0
    per_unit: float = 1.0
    spans_time: bool = False

    @property
    def num_tokens(self) -> int:
        return self.frames * self.rows * self.columns


class MediaGrids(NamedTuple):
    """The processor's data of a prompt's images or videos.

    `token_id` is that of a placeholder. `grids` are in the order of the prompt. `intervals` are the
    positions in time between frames of each video, empty for 1: in Qwen2.5-VL those of `interval`
    for the processor's `second_per_grid_ts`. With `splits_frames` each frame has separate
    placeholders, with its time as text between them, as in videos of Qwen3-VL. `per_unit` and
    `spans_time` are those of its items: in Qwen2.5-Omni intervals are seconds, of 25 positions.
    """

    kind: str  # IMAGE or VIDEO
    token_id: int
    grids: Sequence[Grid]
    intervals: Sequence[float] = ()
    splits_frames: bool = False
    per_unit: float = 1.0
    spans_time: bool = False

    def items(self, merge_size: int) -> list[Item]:
        """The items with placeholders in the prompt; all starts are 0."""
        intervals = self.intervals or (1.0,) * len(self.grids)
        if len(intervals) != len(self.grids):
            raise ValueError(f"{len(intervals)} intervals for {len(self.grids)} {self.kind}s")
        found: list[Item] = []
        for (frames, rows, columns), interval in zip(self.grids, intervals):
            sides = int(rows) // merge_size, int(columns) // merge_size
            if self.splits_frames:
                found += [Item(0, 1, *sides)] * int(frames)
            else:
                time = float(interval), self.per_unit
                found.append(Item(0, int(frames), *sides, *time, spans_time=self.spans_time))
        return found


def interval(seconds: float, per_second: float) -> float:
    """The positions in time between two frames of Qwen2.5-VL that are `seconds` apart.

    As in transformers the product is that of fp32 numbers, and is not rounded to whole positions.
    (transformers 5.17 cut the seconds to whole ones; releases before and after do not.)
    """
    return float(np.float32(seconds) * np.float32(per_second))


def locate(token_ids: Sequence[int], media: Sequence[MediaGrids], merge_size: int) -> list[Item]:
    """The items of a prompt in its order, with their starts.

    Placeholders of two items may be adjacent. Raises ValueError if there are more or fewer
    placeholders than the grids need.
    """
    ids_T = np.asarray(token_ids, np.int64)
    found: list[Item] = []
    for one in media:
        at = np.flatnonzero(ids_T == one.token_id)
        items = one.items(merge_size)
        needed = sum(item.num_tokens for item in items)
        if needed != len(at):
            raise ValueError(
                f"the prompt has {len(at)} {one.kind} placeholder tokens, but its "
                f"{len(one.grids)} {one.kind}(s) need {needed}"
            )
        first = 0
        for i, item in enumerate(items):
            run = at[first : first + item.num_tokens]
            if run[-1] - run[0] != item.num_tokens - 1:
                raise ValueError(
                    f"the placeholder tokens of {one.kind} {i} are not adjacent: it needs "
                    f"{item.num_tokens} from token {run[0]} on"
                )
            found.append(item._replace(start=int(run[0])))
            first += item.num_tokens
    return sorted(found)


def mrope_positions(num_tokens: int, items: Sequence[Item]) -> tuple[np.ndarray, int]:
    """The positions in time, row and column of a prompt's tokens, int64 [3, T], and its delta.

    `items` are in the order of the prompt. A token that follows the prompt at index i has the
    positions i + delta. A prompt without items has each token's index three times, and delta 0.
    """
    pos_3T = np.empty((3, num_tokens), np.int64)
    next_index = next_pos = 0
    for item in items:
        text_len = item.start - next_index
        pos_3T[:, next_index : item.start] = np.arange(next_pos, next_pos + text_len)
        next_pos += text_len
        next_index = item.start + item.num_tokens
        place_3G = _places(item)
        pos_3T[:, item.start : next_index] = next_pos + place_3G
        last_time = place_3G[0, -1] + 1 if item.spans_time else 0
        next_pos += max(item.rows, item.columns, int(last_time))
    pos_3T[:, next_index:] = np.arange(next_pos, next_pos + num_tokens - next_index)
    return pos_3T, int(pos_3T.max(initial=-1)) + 1 - num_tokens


def _places(item: Item) -> np.ndarray:
    """The place of each token of an item, [3, G]; times are fp32 numbers, rounded down."""
    seconds = np.arange(item.frames, dtype=np.float32) * np.float32(item.interval)
    time = (seconds * np.float32(item.per_unit)).astype(np.int64)
    axes = (time, np.arange(item.rows), np.arange(item.columns))
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")])
