"""From the sizes of frames to a tower's inputs, on the host: the frames of each call, and the
positions of their patches. Letters are in `interface`; F frames.

The checkpoint's processor gives the grid (frames, rows, columns) of each image or video, in
patches, and all patches in one array: frame by frame, and within a frame group by group.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanovllm.models.vision.vision_encoder import (
    MAX_FRAMES,
    FrameLayout,
    Taps,
    TowerConfig,
    Windows,
)

Grid = Sequence[int]  # (frames, rows, columns)


class TowerCall(NamedTuple):
    """A part of the frames that goes through the tower at once, and its budget of patches T.

    The budget is None if one frame has more patches than every budget: such a frame needs a call of
    its own size.
    """

    frames_F2: np.ndarray
    num_patches: int
    budget: int | None


class _Order(NamedTuple):
    """The position of each patch, in the order of the processor; all int64 [patches]."""

    frame_T: np.ndarray
    row_T: np.ndarray
    col_T: np.ndarray


def frames_of(grids: Sequence[Grid], merge_size: int) -> np.ndarray:
    """The (rows, columns) of all frames: int64 [F, 2].

    Raises ValueError for a grid whose rows or columns are not positive multiples of `merge_size`.
    """
    for grid in grids:
        frames, *sides = (int(size) for size in grid)
        if frames < 1 or len(sides) != 2 or any(n < 1 or n % merge_size for n in sides):
            raise ValueError(
                f"grid {[frames, *sides]} of an image or video: it must be (frames, rows, columns) "
                f"with rows and columns that are multiples of {merge_size}"
            )
    grid_I3 = np.asarray([list(grid) for grid in grids], np.int64).reshape(-1, 3)
    return np.repeat(grid_I3[:, 1:], grid_I3[:, 0], axis=0)


def calls(frames_F2: np.ndarray, budgets: Sequence[int]) -> list[TowerCall]:
    """Frames in order, as many in a call as the largest of the ascending `budgets` takes, but no
    more than MAX_FRAMES; each call has the smallest budget that takes its frames."""
    found: list[TowerCall] = []
    first, total, largest = 0, 0, budgets[-1]
    sizes = frames_F2.prod(axis=1).tolist()

    def close(end: int) -> None:
        if end > first:
            idx = bisect_left(budgets, total)
            budget = budgets[idx] if idx < len(budgets) else None
            found.append(TowerCall(frames_F2[first:end], total, budget))

    for i, size in enumerate(sizes):
        if total + size > largest or i - first == MAX_FRAMES:
            close(i)
            first, total = i, 0
        total += size
    close(len(sizes))
    return found


def layout(cfg: TowerConfig, frames_F2: np.ndarray, budget: int) -> FrameLayout:
    """The inputs of a call of `budget` patches with these frames, as arrays."""
    counts_F = frames_F2.prod(axis=1)
    order = _order(frames_F2, counts_F, cfg.merge_size)
    ends_F = counts_F.cumsum()
    num = int(ends_F[-1])
    assert num <= budget and len(frames_F2) <= MAX_FRAMES, (num, budget, len(frames_F2))
    row_col_T2 = np.zeros((budget, 2), np.int64)
    row_col_T2[:num] = np.stack((order.row_T, order.col_T), axis=1)
    windows = _windows(cfg, frames_F2, order, budget) if cfg.has_windows else None
    if windows is not None:
        row_col_T2 = _regrouped(row_col_T2, windows.order_G)
    return FrameLayout(
        row_col_T2=row_col_T2,
        frame_start_S=_starts(ends_F, MAX_FRAMES + 1),
        windows=windows,
        taps=_taps(frames_F2, order, cfg.table_side, budget) if cfg.table_side else None,
    )


def _order(frames_F2: np.ndarray, counts_F: np.ndarray, merge_size: int) -> _Order:
    """Patches come group by group: rows of groups, and within a group rows of patches."""
    frame_T = np.repeat(np.arange(len(frames_F2)), counts_F)
    within_T = np.arange(counts_F.sum()) - np.repeat(counts_F.cumsum() - counts_F, counts_F)
    group_T, patch_T = np.divmod(within_T, merge_size**2)
    group_row_T, group_col_T = np.divmod(group_T, frames_F2[frame_T, 1] // merge_size)
    row_T, col_T = np.divmod(patch_T, merge_size)
    return _Order(frame_T, group_row_T * merge_size + row_T, group_col_T * merge_size + col_T)


def _starts(ends: np.ndarray, length: int) -> np.ndarray:
    """0 and `ends`, and the last of them again up to `length`: segments of padding are empty."""
    start_S = np.full(length, ends[-1], np.int32)
    start_S[0], start_S[1 : len(ends) + 1] = 0, ends
    return start_S


def _windows(cfg: TowerConfig, frames_F2: np.ndarray, order: _Order, budget: int) -> Windows:
    """Windows of a frame follow one another by rows, and so do groups in a window."""
    per_group, side = cfg.patches_per_group, cfg.window_groups
    frame_g, row_g, col_g = (
        order.frame_T[::per_group],
        order.row_T[::per_group] // cfg.merge_size,
        order.col_T[::per_group] // cfg.merge_size,
    )
    across_F = -(-frames_F2[:, 1] // (side * cfg.merge_size))  # windows in a row of them
    window_g = (row_g // side) * across_F[frame_g] + col_g // side
    order_g = np.lexsort((col_g, row_g, window_g, frame_g))
    num_groups = budget // per_group
    order_G = np.arange(num_groups)
    order_G[: len(order_g)] = order_g
    place_G = np.empty_like(order_G)
    place_G[order_G] = np.arange(num_groups)
    key_g2 = np.stack((frame_g, window_g), axis=1)[order_g]
    last_g = np.append((key_g2[1:] != key_g2[:-1]).any(axis=1), True)
    ends = (np.flatnonzero(last_g) + 1) * per_group
    return Windows(order_G, place_G, _starts(ends, max_windows(num_groups, side) + 1))


def max_windows(num_groups: int, side: int) -> int:
    """The most windows of `side`² groups in a call. Kernels launch programs for each of them.

    A frame of R rows and C columns has ⌈R / side⌉ · ⌈C / side⌉ ≤ R · C / side + 1 windows. If R ≤
    side, that is ⌈C / side⌉. If both are larger, ⌈R / side⌉ ≤ 2R / (side + 1), and (side + 1)² is
    at least 4 · side.
    """
    return min(num_groups, num_groups // side + MAX_FRAMES)


def _regrouped(x_T2: np.ndarray, order_G: np.ndarray) -> np.ndarray:
    return x_T2.reshape(len(order_G), -1)[order_G].reshape(x_T2.shape)


def _taps(frames_F2: np.ndarray, order: _Order, side: int, budget: int) -> Taps:
    """Bilinear interpolation with aligned corners; fp32 throughout, as in transformers."""
    num = len(order.frame_T)
    entry_T4 = np.zeros((budget, 4), np.int64)
    weight_T4 = np.zeros((budget, 4), np.float32)
    sides_T2 = frames_F2[order.frame_T]
    row_T2, row_weight_T2 = _axis_taps(order.row_T, sides_T2[:, 0], side)
    col_T2, col_weight_T2 = _axis_taps(order.col_T, sides_T2[:, 1], side)
    entry_T22 = row_T2[:, :, None] * side + col_T2[:, None, :]
    entry_T4[:num] = entry_T22.reshape(-1, 4)
    weight_T4[:num] = (row_weight_T2[:, :, None] * col_weight_T2[:, None, :]).reshape(-1, 4)
    return Taps(entry_T4, weight_T4)


def _axis_taps(at_T: np.ndarray, size_T: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The two entries of an axis around each place, and their weights: [T, 2] each."""
    scaled_T = at_T.astype(np.float32) * np.float32(side - 1)
    source_T = scaled_T / np.maximum(size_T - 1, 1).astype(np.float32)
    low_T = np.floor(source_T)
    upper_T = source_T - low_T
    tap_T2 = np.stack((low_T, low_T + 1), axis=1).astype(np.int64)
    return np.minimum(tap_T2, side - 1), np.stack((1 - upper_T, upper_T), axis=1)
