"""Positions of prompts with clips, images and videos equal those of transformers' Qwen2.5-Omni."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.models.vision.positions import IMAGE, VIDEO, MediaGrids, locate, mrope_positions
from tests.models import omni_cases

AUDIO = "audio"
IDS = {kind: omni_cases.IDS[f"<|{kind.upper()}|>"] for kind in (AUDIO, IMAGE, VIDEO)}
VISION_MARKS = tuple(omni_cases.IDS[f"<|vision_{one}|>"] for one in ("bos", "eos"))
AUDIO_MARKS = tuple(omni_cases.IDS[f"<|audio_{one}|>"] for one in ("bos", "eos"))
MERGE, PER_SECOND = 2, 25
# numbers of text tokens, and (kind, grid) of media; the grid of a clip is (frames,)
Piece = int | tuple[str, tuple[int, ...]]
PROMPTS: dict[str, list[Piece]] = {
    "clip": [3, (AUDIO, (19,)), 5],
    "clips": [(AUDIO, (3,)), 1, (AUDIO, (101,)), (AUDIO, (12,))],
    "clip before image": [2, (AUDIO, (37,)), 4, (IMAGE, (1, 6, 10)), 3],
    "image before clip": [(IMAGE, (1, 34, 2)), 7, (AUDIO, (37,))],
    "image beside clip": [1, (IMAGE, (1, 2, 2)), (AUDIO, (8,)), (IMAGE, (1, 4, 26)), 2],
    "video": [4, (VIDEO, (3, 4, 6)), 11],
    "short video": [4, (VIDEO, (1, 2, 62)), 11],
    "all": [1, (VIDEO, (2, 4, 4)), (AUDIO, (23,)), 6, (IMAGE, (1, 4, 4)), (VIDEO, (4, 2, 2)), 9],
}


def prompt(pieces: list[Piece]) -> tuple[list[int], dict[str, list[tuple[int, ...]]]]:
    """Token ids and the grids of each kind."""
    ids: list[int] = []
    grids: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in IDS}
    for piece in pieces:
        if isinstance(piece, int):
            ids += [5] * piece
            continue
        kind, grid = piece
        grids[kind].append(grid)
        num = (grid[0] + 1) // 4 if kind == AUDIO else int(np.prod(grid)) // MERGE**2
        begin, end = AUDIO_MARKS if kind == AUDIO else VISION_MARKS
        ids += [begin, *[IDS[kind]] * num, end]
    return ids, grids


def transformers_positions(
    ids: list[int], grids: dict[str, list[tuple[int, ...]]], seconds: list[float]
) -> tuple[np.ndarray, int]:
    from transformers import Qwen2_5OmniThinkerModel

    with torch.device("meta"):
        model: Any = Qwen2_5OmniThinkerModel(omni_cases.config())
    given = {kind: torch.tensor(of) if of else None for kind, of in grids.items()}
    pos_31T, delta = model.get_rope_index(
        torch.tensor([ids]),
        image_grid_thw=given[IMAGE],
        video_grid_thw=given[VIDEO],
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        audio_seqlens=None if given[AUDIO] is None else given[AUDIO][:, 0],
        second_per_grids=torch.tensor(seconds),
    )
    return pos_31T[:, 0].numpy(), int(delta)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("seconds", [1.0, 0.2, 2 / 30, 1.56])
def test_positions_are_those_of_transformers(name: str, seconds: float) -> None:
    ids, grids = prompt(PROMPTS[name])
    each = [seconds * (i + 1) for i in range(len(grids[VIDEO]))]
    videos = MediaGrids(
        VIDEO, IDS[VIDEO], grids[VIDEO], each, per_unit=float(PER_SECOND), spans_time=True
    )
    items = locate(ids, (MediaGrids(IMAGE, IDS[IMAGE], grids[IMAGE]), videos), MERGE)
    pos_3T, delta = mrope_positions(len(ids), items)
    expected_3T, expected_delta = transformers_positions(ids, grids, each)
    np.testing.assert_array_equal(pos_3T, expected_3T)
    assert delta == expected_delta
