"""Chunks of prompts end in no image whose tokens see all of it."""

from __future__ import annotations

import pytest

from nanovllm.sampling import SamplingParams
from nanovllm.schedule.request import MMSpan, Request

SPANS = (MMSpan(10, 8, b""), MMSpan(18, 4, b""), MMSpan(30, 8, b""))


@pytest.mark.parametrize(
    ("computed", "wanted", "most", "expected"),
    [
        (0, 10, 40, 10),  # up to an image
        (0, 11, 40, 10),
        (0, 17, 40, 10),
        (0, 18, 40, 18),
        (0, 20, 40, 18),  # between two images without text
        (10, 3, 40, 8),  # the first is of an image, which is taken as a whole
        (10, 3, 7, 0),  # if there is room
        (14, 2, 40, 4),  # the rest of one whose beginning was in the cache
        (22, 9, 40, 8),
        (38, 5, 5, 5),
        (0, 0, 40, 0),
    ],
)
def test_a_chunk_has_whole_images(computed: int, wanted: int, most: int, expected: int) -> None:
    request = Request(0, [1] * 60, SamplingParams(), 0, 1, frozenset(), contents=SPANS)
    request.num_computed = computed
    assert request.whole(wanted, most) == expected
