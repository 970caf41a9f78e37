"""The host's inputs of vision towers equal those that transformers computes from the grids."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nanovllm.models.vision import layout as layouts
from nanovllm.models.vision.registry import tower
from nanovllm.models.vision.vision_encoder import MAX_FRAMES, TowerConfig
from tests.models import tower_cases

Grids = list[tuple[int, int, int]]
# one token; thin both ways; exact windows (3 · 3 tokens) and one more; several; video
GRIDS: dict[str, Grids] = {
    "one token": [(1, 2, 2)],
    "wide": [(1, 2, 66)],
    "tall": [(1, 38, 2)],
    "exact": [(1, 12, 6)],
    "odd": [(1, 14, 20)],
    "several": [(1, 6, 10), (1, 2, 2), (1, 8, 14)],
    "video": [(8, 4, 10)],
    "video and images": [(2, 8, 6), (1, 2, 4), (3, 2, 14)],
}


def config(name: str) -> TowerConfig:
    return tower(tower_cases.config(name).vision_config, torch.float32).config


def size(grids: Grids) -> int:
    return sum(frames * rows * columns for frames, rows, columns in grids)


def numbers(array: object) -> np.ndarray:
    assert isinstance(array, np.ndarray)
    return array


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("padding", [0, 36])
def test_windows_and_positions_are_those_of_transformers(name: str, padding: int) -> None:
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    cfg, grids, num = config("qwen2_5_vl"), GRIDS[name], size(GRIDS[name])
    made = layouts.layout(cfg, layouts.frames_of(grids, 2), num + padding)
    order, ends = get_vision_window_index(torch.tensor(grids), 2, 27, 4)
    assert made.windows is not None
    np.testing.assert_array_equal(numbers(made.windows.order_G)[: num // 4], order)
    np.testing.assert_array_equal(
        numbers(made.windows.order_G)[numbers(made.windows.place_G)], np.arange((num + padding) / 4)
    )
    np.testing.assert_array_equal(numbers(made.windows.start_S)[: len(ends)], ends)
    assert (numbers(made.windows.start_S)[len(ends) :] == num).all()
    positions = get_vision_position_ids(torch.tensor(grids), 2).view(num // 4, 4, 2)[order]
    np.testing.assert_array_equal(numbers(made.row_col_T2)[:num], positions.reshape(num, 2))


@pytest.mark.parametrize("name", GRIDS)
def test_frames_and_interpolation_are_those_of_transformers(name: str) -> None:
    from transformers.vision_utils import (
        get_vision_cu_seqlens,
        get_vision_interpolation_indices_and_weights,
        get_vision_position_ids,
    )

    cfg, grids, num = config("qwen3_vl"), GRIDS[name], size(GRIDS[name])
    made = layouts.layout(cfg, layouts.frames_of(grids, 2), num + 36)
    ends = get_vision_cu_seqlens(torch.tensor(grids))
    np.testing.assert_array_equal(numbers(made.frame_start_S)[: len(ends)], ends)
    assert (numbers(made.frame_start_S)[len(ends) :] == num).all()
    assert len(numbers(made.frame_start_S)) == MAX_FRAMES + 1
    positions = get_vision_position_ids(torch.tensor(grids), 2)
    np.testing.assert_array_equal(numbers(made.row_col_T2)[:num], positions)
    entries, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), 7, align_corners=True, spatial_merge_size=2
    )
    assert made.taps is not None and made.windows is None
    np.testing.assert_array_equal(numbers(made.taps.entry_T4)[:num], entries)
    np.testing.assert_allclose(numbers(made.taps.weight_T4)[:num], weights, atol=1e-6)


def test_frames_fill_calls_in_order_and_calls_have_the_smallest_budget() -> None:
    frames_F2 = layouts.frames_of([(2, 4, 8), (1, 8, 8), (1, 4, 2), (1, 2, 2)], 2)
    found = layouts.calls(frames_F2, (16, 64, 128))
    assert [(call.frames_F2.tolist(), call.num_patches, call.budget) for call in found] == [
        ([[4, 8], [4, 8], [8, 8]], 128, 128),
        ([[4, 2], [2, 2]], 12, 16),
    ]


def test_a_frame_larger_than_all_budgets_has_a_call_of_its_own() -> None:
    found = layouts.calls(layouts.frames_of([(1, 2, 2), (1, 10, 8), (1, 2, 4)], 2), (16, 64))
    assert [(call.num_patches, call.budget) for call in found] == [(4, 16), (80, None), (8, 16)]


@pytest.mark.parametrize("num", [MAX_FRAMES - 1, MAX_FRAMES, MAX_FRAMES + 1, 3 * MAX_FRAMES])
def test_no_call_has_more_frames_than_there_are_segments(num: int) -> None:
    found = layouts.calls(layouts.frames_of([(num, 2, 2)], 2), (4096,))
    counts = [len(call.frames_F2) for call in found]
    assert sum(counts) == num and max(counts) <= MAX_FRAMES
    assert len(counts) == -(-num // MAX_FRAMES)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_no_call_has_more_windows_than_there_are_segments(side: int) -> None:
    lengths = range(1, 2 * side + 3)
    fullest = 0.0
    for rows, columns in itertools.product(lengths, lengths):
        windows = -(-rows // side) * -(-columns // side)
        for num in (1, MAX_FRAMES):
            most = layouts.max_windows(num * rows * columns, side)
            assert num * windows <= most
            fullest = max(fullest, num * windows / most)
    assert fullest == 1  # no smaller number would do


@pytest.mark.parametrize("grid", [(1, 3, 2), (1, 2, 0), (0, 2, 2), (1, 2, -2)])
def test_grids_that_make_no_whole_tokens_are_refused(grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 2") as error:
        layouts.frames_of([(1, 2, 2), grid], 2)
    assert str(list(grid)) in str(error.value)
