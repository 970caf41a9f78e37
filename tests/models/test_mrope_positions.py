"""Positions in time, rows and columns equal those of transformers, wherever images lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.models.vision.positions import (
    IMAGE,
    VIDEO,
    Item,
    MediaGrids,
    interval,
    locate,
    mrope_positions,
)
from tests.models import tower_cases

IMAGE_ID, VIDEO_ID, BEGIN, END = tower_cases.TOKENS.values()
MERGE = 2

Grid = tuple[int, int, int]
# a prompt: numbers of text tokens, and (kind, grid) of images and videos
Piece = int | tuple[str, Grid]

SMALL, TALL, WIDE, ODD = (1, 2, 2), (1, 34, 2), (1, 4, 26), (1, 6, 10)
PROMPTS: dict[str, list[Piece]] = {
    "first": [(IMAGE, ODD), 5],
    "middle": [7, (IMAGE, TALL), 3],
    "last": [1, (IMAGE, WIDE)],
    "alone": [(IMAGE, SMALL)],
    "two": [3, (IMAGE, SMALL), 19, (IMAGE, ODD), 1],
    "adjacent but for marks": [2, (IMAGE, WIDE), 2, (IMAGE, TALL), 2, (IMAGE, SMALL), 9],
    "video": [4, (VIDEO, (8, 4, 6)), 11],
    "long video": [4, (VIDEO, (16, 2, 2)), 11],
    "image and videos": [1, (VIDEO, (2, 4, 4)), 3, (IMAGE, TALL), 1, (VIDEO, (1, 2, 6)), 2],
}


def prompt(pieces: list[Piece], splits_frames: bool) -> tuple[list[int], dict[str, list[Grid]]]:
    """Token ids and the grids of each kind; with `splits_frames` text is between frames."""
    ids: list[int] = []
    grids: dict[str, list[Grid]] = {IMAGE: [], VIDEO: []}
    for piece in pieces:
        if isinstance(piece, int):
            ids += [5] * piece
            continue
        kind, grid = piece
        grids[kind].append(grid)
        frames, rows, columns = grid
        one = [IMAGE_ID if kind == IMAGE else VIDEO_ID] * (rows * columns // MERGE**2)
        if kind == VIDEO and splits_frames:
            for i in range(frames):
                ids += [*[6] * (3 + i % 2), BEGIN, *one, END]
        else:
            ids += one * frames
    return ids, grids


def transformers_positions(
    name: str,
    ids: list[int],
    grids: dict[str, list[Grid]],
    seconds: list[float] | None,
    per_second: float | None = None,
) -> tuple[np.ndarray, int]:
    from transformers import Qwen2_5_VLModel, Qwen3VLModel

    made = {"qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}[name]
    with torch.device("meta"):
        model: Any = made(tower_cases.config(name))
    if per_second is not None:
        model.config.vision_config.tokens_per_second = per_second
    types = [{IMAGE_ID: 1, VIDEO_ID: 2}.get(token, 0) for token in ids]
    given = {kind: torch.tensor(of) if of else None for kind, of in grids.items()}
    extra = {} if seconds is None else {"second_per_grid_ts": torch.tensor(seconds)}
    pos_31T, delta = model.get_rope_index(
        torch.tensor([ids]),
        torch.tensor([types]),
        image_grid_thw=given[IMAGE],
        video_grid_thw=given[VIDEO],
        **extra,
    )
    return pos_31T[:, 0].numpy(), int(delta)


def media(
    grids: dict[str, list[Grid]], intervals: list[float], splits_frames: bool
) -> tuple[MediaGrids, MediaGrids]:
    videos = MediaGrids(VIDEO, VIDEO_ID, grids[VIDEO], intervals, splits_frames)
    return MediaGrids(IMAGE, IMAGE_ID, grids[IMAGE]), videos


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("seconds", [None, 0.5, 1.37])
def test_positions_of_qwen2_5_vl_are_those_of_transformers(
    name: str, seconds: float | None
) -> None:
    ids, grids = prompt(PROMPTS[name], splits_frames=False)
    each = None if seconds is None else [seconds * (i + 1) for i in range(len(grids[VIDEO]))]
    per_second = tower_cases.config("qwen2_5_vl").vision_config.tokens_per_second
    intervals = [per_second * one for one in each or [1.0] * len(grids[VIDEO])]
    items = locate(ids, media(grids, intervals, False), MERGE)
    pos_3T, delta = mrope_positions(len(ids), items)
    expected_3T, expected_delta = transformers_positions("qwen2_5_vl", ids, grids, each)
    np.testing.assert_array_equal(pos_3T, expected_3T)
    assert delta == expected_delta


@pytest.mark.parametrize("per_second", [2, 4, 10, 25])
@pytest.mark.parametrize("fps", [1.5, 3.0, 12.5, 24.0, 29.97])
def test_times_of_long_videos_are_rounded_as_in_transformers(per_second: int, fps: float) -> None:
    ids, grids = prompt([3, (VIDEO, (384, 2, 2)), 9], splits_frames=False)
    found = interval(2 / fps, per_second)
    pos_3T, delta = mrope_positions(len(ids), locate(ids, media(grids, [found], False), MERGE))
    expected = transformers_positions("qwen2_5_vl", ids, grids, [2 / fps], per_second)
    np.testing.assert_array_equal(pos_3T, expected[0])
    assert delta == expected[1]


@pytest.mark.parametrize("name", PROMPTS)
def test_positions_of_qwen3_vl_are_those_of_transformers(name: str) -> None:
    ids, grids = prompt(PROMPTS[name], splits_frames=True)
    items = locate(ids, media(grids, [], True), MERGE)
    pos_3T, delta = mrope_positions(len(ids), items)
    expected_3T, expected_delta = transformers_positions("qwen3_vl", ids, grids, None)
    np.testing.assert_array_equal(pos_3T, expected_3T)
    assert delta == expected_delta


def test_a_prompt_without_images_has_the_positions_of_text() -> None:
    pos_3T, delta = mrope_positions(19, [])
    np.testing.assert_array_equal(pos_3T, np.tile(np.arange(19), (3, 1)))
    assert delta == 0


def test_adjacent_placeholders_are_told_apart_by_their_grids() -> None:
    ids, grids = prompt([(IMAGE, ODD), (IMAGE, SMALL), 1], splits_frames=False)
    assert locate(ids, media(grids, [], False), MERGE) == [Item(0, 1, 3, 5), Item(15, 1, 1, 1)]


@pytest.mark.parametrize("change", [-1, 1])
def test_placeholders_that_do_not_fit_the_grids_are_refused(change: int) -> None:
    ids = [5, *[IMAGE_ID] * (15 + change), 5]
    with pytest.raises(ValueError, match=rf"has {15 + change} image placeholder .* need 15$"):
        locate(ids, [MediaGrids(IMAGE, IMAGE_ID, [ODD])], MERGE)


def test_placeholders_of_one_image_with_text_between_are_refused() -> None:
    ids = [*[IMAGE_ID] * 7, 5, *[IMAGE_ID] * 8]
    with pytest.raises(ValueError, match="of image 0 are not adjacent: it needs 15 from token 0"):
        locate(ids, [MediaGrids(IMAGE, IMAGE_ID, [ODD])], MERGE)


def test_intervals_must_be_one_for_each_video() -> None:
    with pytest.raises(ValueError, match="2 intervals for 1 videos"):
        locate([VIDEO_ID], [MediaGrids(VIDEO, VIDEO_ID, [SMALL], [1.0, 2.0])], MERGE)
