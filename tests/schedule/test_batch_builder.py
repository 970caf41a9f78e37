"""Plans of steps: built from requests, written as bytes and read back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from nanovllm import SamplingParams
from nanovllm.schedule.batch_builder import Chunk, decode_plan, prefill_plan, sampling_metadata
from nanovllm.schedule.plan import ALL_TOKENS, NEWEST, PLAIN, LogitEdits, SamplingMetadata, StepPlan
from nanovllm.schedule.request import MMSpan, Request


def request(row: int, num_prompt: int, outputs: tuple[int, ...] = (), **params: Any) -> Request:
    prompt_ids = [100 * (row + 1) + i for i in range(num_prompt)]
    stop_ids = frozenset({7, 5})
    made = Request(row + 40, prompt_ids, SamplingParams(**params), 11, 8, stop_ids)
    made.row, made.blocks, made.output_ids = row, [[row + 1, row + 2]], list(outputs)
    return made


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for field in fields(one):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, SamplingMetadata):
            assert_same(ours, theirs)
        elif isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
        else:
            assert ours == theirs and type(ours) is type(theirs)


def test_only_last_chunks_sample_and_only_first_ones_set_the_row() -> None:
    whole, later = request(3, 5, temperature=0.5, top_k=9), request(1, 11, repetition_penalty=1.5)
    plan = prefill_plan([Chunk(whole, 0, 5, True, True), Chunk(later, 4, 6, False, False)])
    assert plan.is_prefill and plan.is_sampled == [True, False]
    assert plan.rows == [3, 1] and plan.request_ids == [43, 41]
    assert plan.token_T.tolist() == [*range(400, 405), *range(204, 210)]
    assert plan.num_tokens == [5, 6] and plan.seq_lens == [5, 10]
    (settings,) = plan.settings
    assert settings.row == 3 and settings.pos == 0 and settings.blocks == [[4, 5]]
    assert settings.sampling == [0.5, 1.0, 0.0, 9.0, 1.0, 0.0, 0.0] and settings.seed == 11
    assert not plan.histories and not plan.sampling.has_penalties, "the other does not sample yet"


def test_restarted_requests_feed_their_outputs_too() -> None:
    restarted = request(0, 3, outputs=(11, 12), presence_penalty=1.0, prompt_logprobs=2)
    plan = prefill_plan([Chunk(restarted, 0, 5, True, True)])
    assert plan.token_T.tolist() == [100, 101, 102, 11, 12]
    (history,) = plan.histories
    assert history.prompt_ids == [100, 101, 102] and history.output_ids == [11, 12]
    assert not plan.prompt_logprobs, "the first prefill computed them"


def test_prompt_logprobs_name_each_token_but_the_first() -> None:
    asked = request(0, 9, prompt_logprobs=3)
    chunks = [
        Chunk(asked, 0, 4, True, False),
        Chunk(asked, 4, 4, False, False),
        Chunk(asked, 8, 1, False, True),
    ]
    first, second = (
        prefill_plan([Chunk(request(1, 5), 0, 5, True, True), one]) for one in chunks[:2]
    )
    (wanted,) = first.prompt_logprobs
    assert wanted == (40, 1, 5, [101, 102, 103, 104], 3)
    (wanted,) = second.prompt_logprobs
    assert wanted == (40, 5, 5, [105, 106, 107, 108], 3)
    assert not prefill_plan(chunks[2:]).prompt_logprobs


def test_embeddings_are_cut_at_a_chunks_borders() -> None:
    image = MMSpan(3, 4, b"i" * 32)
    shown = request(0, 9)
    shown.contents = (image,)
    other = Chunk(request(1, 5), 0, 5, True, True)
    spans = [
        prefill_plan([other, Chunk(shown, start, num, False, False)]).embeddings
        for start, num in ((0, 3), (0, 5), (5, 4), (7, 2))
    ]
    assert [[tuple(span) for span in found] for found in spans] == [
        [], [(image.key, 0, 8, 2)], [(image.key, 2, 5, 2)], [],
    ]  # fmt: skip


def test_a_choice_says_all_that_its_rows_ask() -> None:
    plain = [request(0, 3), request(1, 3, temperature=0)]
    assert sampling_metadata(plain) is PLAIN and PLAIN.is_plain
    sampling = sampling_metadata([*plain, request(2, 3, top_p=0.5)])
    assert sampling.has_filters and sampling.state_suffices and not sampling.is_plain
    sampling = sampling_metadata([*plain, request(2, 3, logprobs=2), request(3, 3, logprobs=4)])
    assert sampling.num_logprobs == 4 and not sampling.state_suffices
    assert sampling_metadata([*plain, request(2, 3, frequency_penalty=1)]).has_penalties
    held = request(2, 3, outputs=(1, 2), min_tokens=3)
    held.num_in_flight = 1
    assert sorted(sampling_metadata([*plain, held]).forbidden) == [(2, 5), (2, 7)]
    held.num_in_flight = 2
    assert sampling_metadata([*plain, held]) is PLAIN


def test_all_tokens_are_more_than_any_number_of_them() -> None:
    some, all_tokens = request(0, 3, logprobs=4), request(1, 3, logprobs=2, prompt_logprobs=2)
    for name in ("logprobs", "prompt_logprobs"):
        object.__setattr__(all_tokens.params, name, ALL_TOKENS)
    assert sampling_metadata([some, all_tokens]).num_logprobs == ALL_TOKENS
    (wanted,) = prefill_plan([Chunk(all_tokens, 0, 3, True, True)]).prompt_logprobs
    assert wanted.num_top == ALL_TOKENS


EDITS = LogitEdits({3: 1.5, 4: float("-inf")}, [3, 4, 5], [[3], [5, 3, 4]])


def test_edits_stay_on_the_device_but_no_proposals_are_verified_with_them() -> None:
    plain, changed = request(0, 3), request(1, 3)
    changed.edits = EDITS
    sampling = sampling_metadata([plain, changed])
    assert sampling.has_edits and not sampling.needs_host
    assert not sampling.state_suffices and not sampling.is_plain
    assert sampling_metadata([changed, request(2, 3, logprobs=1)]).needs_host


def test_the_last_chunk_brings_the_edits_and_the_newest_outputs() -> None:
    """Words of three tokens need the two newest tokens."""
    restarted, short = request(0, 3, outputs=(11, 12, 13)), request(1, 9)
    restarted.edits = short.edits = EDITS
    chunks = [Chunk(short, 0, 4, True, False), Chunk(restarted, 0, 6, True, True)]
    plan = prefill_plan(chunks)
    assert plan.edits == [(0, EDITS, [12, 13])] and plan.sampling.has_edits
    (row,) = prefill_plan([Chunk(short, 4, 5, False, True)]).edits
    assert row == (1, EDITS, [])
    restarted.edits = EDITS._replace(bad=[[3]])
    assert prefill_plan(chunks[1:]).edits[0].output_ids == []
    assert not prefill_plan(chunks[:1]).sampling.has_edits


def test_forbidden_tokens_keep_their_rows_beside_unfinished_prompts() -> None:
    held = request(2, 3, min_tokens=3)
    held.num_in_flight = 1
    plan = prefill_plan([Chunk(request(1, 9), 0, 4, True, False), Chunk(held, 0, 3, True, True)])
    assert sorted(plan.sampling.forbidden) == [(1, 5), (1, 7)]


def test_plans_survive_being_written_down() -> None:
    asked = request(0, 9, prompt_logprobs=3, logprobs=1, min_tokens=2, presence_penalty=0.5)
    asked.contents, asked.num_in_flight = (MMSpan(3, 4, b"i" * 32),), 1
    asked.edits = EDITS
    plans = [
        prefill_plan([Chunk(asked, 0, 9, True, True), Chunk(request(1, 7), 2, 5, False, True)]),
        decode_plan([asked, request(1, 7)], [], [(0, 0, 2, 9)], sampling_metadata([asked])),
        decode_plan([request(0, 7), request(1, 7)], [[5, 6], []], [], PLAIN),
    ]
    allowed = np.random.default_rng(0).integers(-(2**31), 2**31, (1, 16), np.int32)
    masked = decode_plan([request(0, 7), request(1, 7)], [], [], SamplingMetadata(masked=[1]))
    plans.append(replace(masked, allowed_MW=allowed))
    for plan in plans:
        assert_same(StepPlan.from_bytes(plan.to_bytes()), plan)
    read_MW = StepPlan.from_bytes(plans[3].to_bytes()).allowed_MW
    assert read_MW is not None and read_MW.flags.writeable and read_MW.flags.aligned
    assert plans[2].token_T.tolist() == [NEWEST, 5, 6, NEWEST] and plans[2].tokens_per_row == 3


def num_calls(work: Callable[[], object]) -> int:
    """How many functions of Python and of C `work` calls."""
    counted = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted


def test_the_work_in_python_to_write_a_plan_does_not_grow_with_its_rows() -> None:
    small, large = (
        decode_plan([request(row, 3) for row in range(num)], [], [], PLAIN) for num in (1, 99)
    )
    assert num_calls(small.to_bytes) == num_calls(large.to_bytes)
