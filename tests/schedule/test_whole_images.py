"""Chunks of prompts end in no image whose tokens see all of it. Requests with such images end, also
with windows and few blocks, or are refused."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from nanovllm.engine.input_processor import InputProcessor
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.cache_groups import CHUNK_TOKENS, CacheGroups
from nanovllm.schedule.plan import PAD_BLOCK, StepPlan
from nanovllm.schedule.request import MMSpan, Request
from nanovllm.schedule.whole_images import WholeImages
from tests.schedule.loads import BLOCK, Known, answer, check, chunks, planned, run, scheduler

SPANS = (MMSpan(10, 8, b""), MMSpan(18, 4, b""), MMSpan(30, 8, b""))
STEP, ANSWER = 2 * CHUNK_TOKENS, 8
WINDOWS = [(0, 9), (9,), (0, 5, 30)]


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


def seeing(windows: tuple[int, ...], num_blocks: int, step: int = STEP, drafts: int = 0) -> Known:
    s = scheduler(windows=windows, num_blocks=1 + num_blocks, max_num_batched_tokens=step)
    s.keeps_images_whole, s.num_drafts = True, drafts
    return s


def with_images(request_id: int, num_prompt: int, images: Sequence[tuple[int, int]]) -> Request:
    """A request with images as (first token, tokens)."""
    contents = tuple(MMSpan(*one, bytes((request_id,))) for one in images)
    params, ids = (
        SamplingParams(max_tokens=ANSWER),
        [1000 * request_id + i for i in range(num_prompt)],
    )
    return Request(request_id, ids, params, 0, ANSWER, frozenset(), contents=contents)


def fits(s: Known, one: Request) -> bool:
    groups, num_blocks = s.cache.groups, s.cache.pool.num_blocks - 1
    try:
        limits = WholeImages(groups, num_blocks, s.num_drafts)
        limits.check(one.contents, len(one.prompt_ids), one.max_output)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("drafts", [0, 7])
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("before", [0, 3, 201, 500])
def test_an_image_is_computed_or_refused_where_the_cache_holds_one_prompt(
    before: int, windows: tuple[int, ...], drafts: int
) -> None:
    """Images about as long as the step for which every admitted request has blocks."""
    results = set()
    for num in range(CHUNK_TOKENS - 44, CHUNK_TOKENS + 200, 7):
        for after in (0, 90):
            one = with_images(1, before + num + after, [(before, num)])
            total = len(one.prompt_ids) + ANSWER
            s = seeing(windows, CacheGroups(windows, BLOCK, STEP).needed(total), drafts=drafts)
            results.add(fits(s, one))
            if fits(s, one):
                s.add(one)
                run(s, limit=30)
                assert not s.num_preemptions
    assert results == {True, False} if before > 200 else True in results


def test_the_limit_is_not_too_low() -> None:
    """With a block less than the prompt needs, a request waits forever."""
    one = with_images(1, 1700, [(401, 1200)])
    groups = CacheGroups((0, 9), BLOCK, STEP)
    assert fits(seeing((0, 9), groups.needed_for(401, 1601, 1708)), one)
    s = seeing((0, 9), groups.needed_for(401, 1601, 1700) - 1)
    assert not fits(s, one)
    s.add(one)
    with pytest.raises(AssertionError, match="no end"):
        run(s, limit=30)


class Tables:
    """The block tables of the device's rows, as plans change them."""

    def __init__(self) -> None:
        self.rows: dict[int, list[dict[int, int]]] = {}

    def follow(self, s: Known, plan: StepPlan) -> None:
        """Take over a plan's changes. All blocks of its rows that queries see must be there."""
        for new in plan.settings:
            self.rows[new.row] = [dict(enumerate(table)) for table in new.blocks]
        for row, group, place, block in plan.new_blocks:
            self.rows[row][group][place] = block
        for request_id, row, (start, num) in zip(plan.request_ids, plan.rows, chunks(plan)):
            for own, given in zip(s.known[request_id].blocks, self.rows[row]):
                seen = enumerate(own[: -(-(start + num) // BLOCK)])
                assert all(given.get(place) == block for place, block in seen if block != PAD_BLOCK)


@pytest.mark.parametrize("seed", range(20))
def test_requests_that_wait_for_blocks_of_their_images(seed: int) -> None:
    """The device's tables have all blocks, also those that a request got while it waited."""
    rng = random.Random(seed)
    windows, step = rng.choice(WINDOWS), rng.choice([16, 40])
    num_blocks = int(CacheGroups(windows, BLOCK, step).needed(140) * rng.choice([1, 1.5, 2]))
    s, tables = seeing(windows, num_blocks, step, drafts=rng.choice([0, 3])), Tables()
    for request_id in range(1, 20):
        ends = sorted(rng.sample(range(1, 92), 6))
        images = [(start, min(end - start, step)) for start, end in zip(ends[::2], ends[1::2])]
        one = with_images(request_id, rng.randint(92, 100), images)
        one.max_output = rng.randint(1, 40)
        assert fits(s, one)
        s.add(one)
    for _ in range(1000):
        if s.has_work:
            plan = planned(s)
            check(s, plan)
            tables.follow(s, plan)
            answer(s, plan)
    assert not s.has_work


def test_an_image_is_refused_with_its_size_and_the_limit() -> None:
    groups = CacheGroups((0, 9), BLOCK, STEP)
    limits = WholeImages(groups, groups.needed(1508))
    intake = InputProcessor("m", None, 2000, 1, 1508, whole_images=limits)
    params, prompt = SamplingParams(max_tokens=8), list(range(1500))
    assert intake.request(prompt, params, embeddings=[(200, torch.zeros(1024, 1))]).contents
    with pytest.raises(ValueError, match=r"image of 1200 tokens .* 200 on needs 679 .* has 636"):
        intake.request(prompt, params, embeddings=[(200, torch.zeros(1200, 1))])
