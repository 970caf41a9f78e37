"""The forms in which users give media."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanovllm.media import mm_inputs
from nanovllm.media.options import MediaOptions

PICTURE = Image.new("RGB", (4, 4))
ARRAY = np.zeros((4, 4, 3), np.uint8)


def names(found: list[mm_inputs.MMInput]) -> list[str]:
    return [one.name for one in found]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, []),
        ({"image": None}, []),
        ({"image": []}, []),
        ({"image": PICTURE}, ["image 1"]),
        ({"image": [PICTURE, ARRAY]}, ["image 1", "image 2"]),
        ({"image": np.zeros((3, 4, 4, 3), np.uint8)}, ["image 1", "image 2", "image 3"]),
        ({"image": torch.zeros(3, 4, 4, dtype=torch.uint8)}, ["image 1"]),
        ({"video": [PICTURE, PICTURE]}, ["video 1"]),
        ({"video": [ARRAY, ARRAY]}, ["video 1"]),
        ({"video": [[PICTURE], [PICTURE]]}, ["video 1", "video 2"]),
        ({"video": np.zeros((2, 4, 4, 3), np.uint8)}, ["video 1"]),
        ({"video": np.zeros((2, 2, 4, 4, 3), np.uint8)}, ["video 1", "video 2"]),
        ({"video": ([PICTURE], {"fps": 2})}, ["video 1"]),
        ({"video": [([PICTURE], {"fps": 2}), [PICTURE]]}, ["video 1", "video 2"]),
        ({"image": PICTURE, "video": [PICTURE]}, ["image 1", "video 1"]),
    ],
)
def test_data_are_lists_or_single_items(data: Any, expected: list[str]) -> None:
    assert names(mm_inputs.from_data(data)) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([PICTURE], "multi_modal_data must be a dict"),
        ({"sound": 1}, "multi_modal_data has the key 'sound'"),
        ({"image": [3]}, "image 1 is of type int"),
        ({"image": [PICTURE, b"abc"]}, "image 2 is of type bytes"),
        ({"video": 3}, "video 1 is of type int"),
        ({"video": []}, None),
        ({"video": [[]]}, "video 1 has no frames"),
        ({"video": [[PICTURE, 3]]}, "video 1 has a frame of type int"),
        ({"video": ([PICTURE], {"speed": 2})}, "video 1 has metadata 'speed'"),
        ({"video": ([PICTURE], {"fps": 0})}, "video 1 has fps 0"),
        ({"video": ("a.mp4", {"fps": 2})}, "video 1 is a file, which has its own metadata"),
    ],
)
def test_wrong_data_are_refused(data: Any, message: str | None) -> None:
    if message is None:
        assert mm_inputs.from_data(data) == []
        return
    with pytest.raises(ValueError, match=message):
        mm_inputs.from_data(data)


def test_parts_become_bare_parts_and_media_in_order() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "video", "video": [PICTURE], "video_metadata": {"fps": 2.0}},
                "b",
                {"type": "image", "image": PICTURE},
            ],
        },
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": "/a/b.png"}]},
    ]
    bare, media = mm_inputs.from_messages(messages)
    assert bare == [
        messages[0],
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"}, {"type": "image"}, {"type": "video"}, "b",
                {"type": "image"},
            ],
        },
        messages[2],
        {"role": "user", "content": [{"type": "image"}]},
    ]  # fmt: skip
    assert names(media) == ["image 1", "video 1", "image 2", "image 3"]
    assert [media[0].value, media[3].value] == ["data:image/png;base64,AA==", "/a/b.png"]
    assert media[2].value is PICTURE and media[1].metadata == {"fps": 2.0}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url"}, "image 1 is empty"),
        ({"type": "image_url", "image_url": {"url": 3}}, "image 1 has a URL of type int"),
        ({"type": "image_url", "image_url": {"url": "a", "x": 1}}, "image 1 has the option 'x'"),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "fine"}}, "detail 'fine': use"),
        ({"type": "image", "image": PICTURE, "min_pixels": 4}, "the option 'min_pixels'"),
        ({"type": "image", "image": 3}, "image 1 is of type int"),
        ({"type": "video", "video": [PICTURE], "fps": 2}, "video 1 has the option 'fps'"),
        ({"type": "video", "video": [PICTURE], "video_metadata": 2}, "metadata of type int"),
    ],
)
def test_wrong_parts_are_refused(part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mm_inputs.from_messages([{"role": "user", "content": [part]}])


def test_more_items_than_allowed_are_refused() -> None:
    options = MediaOptions(max_images=2, max_videos=1)
    mm_inputs.check_counts(
        mm_inputs.from_data({"image": [PICTURE] * 2, "video": [[PICTURE]]}), options
    )
    with pytest.raises(ValueError, match="3 images: at most 2 are allowed"):
        mm_inputs.check_counts(mm_inputs.from_data({"image": [PICTURE] * 3}), options)
    with pytest.raises(ValueError, match="2 videos: at most 1 are allowed"):
        mm_inputs.check_counts(mm_inputs.from_data({"video": [[PICTURE]] * 2}), options)


def test_a_model_without_vision_refuses_images() -> None:
    mm_inputs.refuse("tiny", [])
    with pytest.raises(ValueError, match="has image 1, but 'tiny' accepts text only"):
        mm_inputs.refuse("tiny", mm_inputs.from_data({"image": PICTURE}))


@pytest.mark.parametrize("detail", ["auto", "low", "high", None])
def test_details_of_openai_are_accepted(detail: str | None) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:,a", "detail": detail}}
    (found,) = mm_inputs.from_messages([{"role": "user", "content": [part]}])[1]
    assert found.value == "data:,a"
