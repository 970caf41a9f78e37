"""Plans without a device: a loop in place of the runner answers each step at once or later."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from nanovllm import SamplingParams
from nanovllm.schedule.plan import DRAFT, NEWEST, StepPlan
from nanovllm.schedule.prefill_latency_bound import PrefillLatencyBound
from nanovllm.schedule.request import MMSpan, Status
from nanovllm.schedule.scheduler import PREFILLS_FIRST
from tests.schedule.loads import (
    BLOCK,
    DECODE,
    PREFILL,
    Known,
    answer,
    check,
    chunks,
    planned,
    request,
    run,
    run_random_load,
    scheduler,
)


def test_prompts_are_packed_in_order_of_arrival() -> None:
    s = scheduler()
    for i, num in enumerate((5, 6, 9, 3)):
        s.add(request(i, num))
    plan = planned(s)
    assert plan.is_prefill and plan.request_ids == [0, 1, 2]
    assert chunks(plan) == [(0, 5), (0, 6), (0, 5)]
    assert plan.is_sampled == [True, True, False]


def test_a_long_prompt_is_split_and_the_rest_of_the_budget_goes_to_the_next() -> None:
    s = scheduler()
    s.add(request(0, 40))
    s.add(request(1, 20))
    plans = [planned(s) for _ in range(3)]
    assert [list(zip(plan.request_ids, chunks(plan), plan.is_sampled)) for plan in plans] == [
        [(0, (0, 16), False)],
        [(0, (16, 16), False)],
        [(0, (32, 8), True), (1, (0, 8), False)],
    ]
    # the device's row is written once, before the first chunk
    assert [[settings.pos for settings in plan.settings] for plan in plans] == [[0], [], [0]]


def test_prompts_that_go_on_arriving_do_not_starve_a_request() -> None:
    """It is not streamed, and each prompt is done with its first token, so rows never run out."""
    s = scheduler()
    long = request(0, 4, 20)
    s.add(long)
    kinds = []
    for idx in range(1, 100):
        if long.status is Status.FINISHED:
            break
        s.add(request(idx, 8, 1))
        plan = planned(s)
        kinds.append(plan.is_prefill)
        answer(s, plan)
    assert long.status is Status.FINISHED and len(long.output_ids) == 20
    first, later = kinds[: 1 + PREFILLS_FIRST], kinds[1 + PREFILLS_FIRST :]
    assert set(first) == {PREFILL}, "its own step, and the others"
    assert (PREFILL, PREFILL) not in list(itertools.pairwise(later))


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_watched_request_waits_for_one_prefill_step_at_most(run_ahead: int) -> None:
    s = scheduler()
    s.add(request(0, 4, 30))
    s.waiting[-1].incremental = True
    answer(s, s.schedule(may_preempt=True))
    s.add(request(1, 150, 2))
    kinds = [plan.is_prefill for plan in run(s, run_ahead=run_ahead)]
    assert kinds.count(PREFILL) == 10
    pairs = list(itertools.pairwise(kinds))
    assert (PREFILL, PREFILL) not in pairs, "a decodable request waited for two prefill steps"
    # the prompt does not wait for more than one decode step
    last = max(i for i, kind in enumerate(kinds) if kind is PREFILL)
    assert (DECODE, DECODE) not in pairs[:last]


def test_prompts_go_first_when_nobody_watches() -> None:
    s = scheduler()
    s.add(request(0, 4, 30))
    answer(s, s.schedule(may_preempt=True))
    s.add(request(1, 150, 2))
    kinds = [plan.is_prefill for plan in run(s)]
    assert kinds[:10] == [PREFILL] * 10 and kinds.count(PREFILL) == 10


# a step of a small model on a large GPU; a chunk of 8192 after 8192 others would take 15 + 50 ms
STALL = PrefillLatencyBound(
    30.0, ((32, 2.0), (128, 2.0), (512, 2.5), (2048, 4.5), (8192, 15.0)), 5e-7
)


def with_long_prompt(
    stall: PrefillLatencyBound, *, watched: bool, **changes: Any
) -> tuple[Known, list[StepPlan], list[float]]:
    """Add a prompt of 16,384 tokens while eight requests decode. Returns the scheduler, all plans
    from then on, and the estimated milliseconds of the prefill steps."""
    sizes = {"num_blocks": 6000, "max_num_seqs": 16, "max_num_batched_tokens": 8192, **changes}
    s = scheduler(stall=stall, **sizes)
    for i in range(8):
        s.add(request(i, 4, 600))
        s.waiting[-1].incremental = watched and i == 3
    answer(s, s.schedule(may_preempt=True))
    s.add(request(8, 16_384, 2))
    s.add(request(9, 100, 2))
    plans = run(s)
    prefills = [plan for plan in plans if plan.is_prefill]
    assert sum(sum(plan.num_tokens) for plan in prefills) == 16_484
    times = [stall.estimate([(num, start) for start, num in chunks(plan)]) for plan in prefills]
    return s, plans, times


@pytest.mark.parametrize("max_ms", [5.0, 10.0, 30.0, 60.0])
def test_prefill_steps_stay_within_the_bound_while_tokens_are_watched(max_ms: float) -> None:
    _, plans, times = with_long_prompt(replace(STALL, max_ms=max_ms), watched=True)
    assert all(ms <= max_ms for ms in times)
    kinds = [plan.is_prefill for plan in plans]
    assert (PREFILL, PREFILL) not in list(itertools.pairwise(kinds))


def test_the_bound_costs_few_steps() -> None:
    _, _, times = with_long_prompt(STALL, watched=True)
    assert len(times) <= 9, "eight full buckets of 2048, and what is left"


def test_a_prompt_ends_whatever_the_bound() -> None:
    _, plans, times = with_long_prompt(replace(STALL, max_ms=0.001), watched=True)
    assert len(times) == 16_384 // 32 + 4
    assert all(sum(plan.num_tokens) <= 32 for plan in plans if plan.is_prefill)


def with_short_prompts(num_blocks: int) -> list[int]:
    """The tokens of each prefill step for 30 prompts of 600 tokens that arrive while a request
    streams."""
    sizes = {"max_num_seqs": 64, "max_decode_rows": 64, "max_prefill_rows": 64}
    s = scheduler(stall=STALL, num_blocks=num_blocks, max_num_batched_tokens=8192, **sizes)
    s.add(request(0, 4, 100))
    s.waiting[0].incremental = True
    answer(s, planned(s))
    for i in range(1, 31):
        s.add(request(i, 600, 2))
    return [sum(plan.num_tokens) for plan in run(s) if plan.is_prefill]


def test_short_prompts_share_the_largest_bucket_within_the_bound() -> None:
    assert with_short_prompts(num_blocks=6000) == [8192, 8192, 18_000 - 2 * 8192]


def test_prompts_without_free_blocks_do_not_count_as_waiting() -> None:
    assert with_short_prompts(num_blocks=200) == [512, 88] * 30


def test_a_batch_that_nobody_watches_is_not_cut() -> None:
    _, plans, times = with_long_prompt(STALL, watched=False)
    sizes = [sum(plan.num_tokens) for plan in plans if plan.is_prefill]
    assert sizes == [8192, 8192, 100] and max(times) > STALL.max_ms


def test_nobody_waits_for_a_prompt_that_is_alone() -> None:
    s = scheduler(stall=STALL, num_blocks=6000, max_num_batched_tokens=8192)
    s.add(request(0, 16_384))
    s.waiting[0].incremental = True
    plan = planned(s)
    assert plan.is_prefill and plan.num_tokens == [8192]


def test_rows_that_decode_in_turns_share_the_bound() -> None:
    _, _, times = with_long_prompt(STALL, watched=True, max_decode_rows=3)
    assert max(times) <= 10.0


def test_prefill_goes_first_when_nothing_decodes() -> None:
    s = scheduler()
    s.add(request(0, 40))
    assert [planned(s).is_prefill for _ in range(3)] == [PREFILL] * 3


def test_a_request_that_does_not_fit_holds_back_those_behind_it() -> None:
    s = scheduler(num_blocks=1 + 8)
    s.add(request(0, 16, 10))
    answer(s, s.schedule(may_preempt=True))
    s.add(request(1, 24, 1))  # needs 6 blocks; 4 are free
    s.add(request(2, 1))
    answer(s, s.schedule(may_preempt=True))
    assert [one.request_id for one in s.running] == [0] and [
        one.request_id for one in s.waiting
    ] == [1, 2]
    plans = run(s)
    first = [
        request_id
        for plan in plans
        for request_id, wanted in zip(plan.request_ids, plan.is_sampled)
        if plan.is_prefill and wanted
    ]
    assert first == [1, 2]


def test_no_more_than_max_num_seqs_run() -> None:
    s = scheduler(max_num_seqs=3)
    for i in range(7):
        s.add(request(i, 2, 3))
    plans = run(s)
    assert max(len(plan.rows) for plan in plans if not plan.is_prefill) == 3


def test_no_more_than_max_prefill_rows_share_a_step() -> None:
    s = scheduler(max_prefill_rows=2)
    for i in range(5):
        s.add(request(i, 2, 1))
    assert [len(plan.rows) for plan in run(s) if plan.is_prefill] == [2, 2, 1]


def test_more_requests_than_decode_rows_take_turns() -> None:
    s = scheduler(max_decode_rows=3, max_num_batched_tokens=64)
    for i in range(8):
        s.add(request(i, 2, 13))
    decodes = [plan.request_ids for plan in run(s) if not plan.is_prefill]
    assert decodes[:3] == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]
    for start in range(len(decodes) - 40):
        counts = [sum(i in rows for rows in decodes[: start + 8]) for i in range(8)]
        assert max(counts) - min(counts) <= 1
    assert sum(map(len, decodes)) == 8 * 12


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    s = scheduler(num_blocks=1 + 6, enable_prefix_caching=False)
    for i in range(3):
        s.add(request(i, 4, 12))
    answer(s, s.schedule(may_preempt=True))
    s.add(request(3, 4, 12))
    seen = []
    for _ in range(6):
        before = {one.request_id for one in s.running}
        num = s.num_preemptions
        plan = s.schedule(may_preempt=True)
        check(s, plan)
        if s.num_preemptions > num:
            gone = before - {one.request_id for one in s.running}
            assert gone == {max(before)}, "only the newest makes room"
            assert s.waiting[0].request_id == max(before)
            seen.append(max(before))
        answer(s, plan)
    assert seen[0] == 2
    run(s)
    assert not s.has_work


def test_a_lone_victim_leaves_the_step_to_those_before_it() -> None:
    """The newest request alone has its turn and is preempted: the step goes to an older one."""
    s = scheduler(num_blocks=1 + 4, max_decode_rows=1, enable_prefix_caching=False)
    s.add(request(0, 4, 9))
    s.add(request(1, 4, 9))
    run(s)
    assert s.num_preemptions > 0


def test_a_retried_request_drops_its_tokens_in_flight_and_shares_no_blocks() -> None:
    s = scheduler()
    first, second = request(0, 9, token=5), request(1, 9, token=5)
    s.add(first)
    answer(s, planned(s))
    s.add(second)
    assert planned(s).request_ids == [1] and second.num_shared == 2 * BLOCK
    s.tokens_known(second, 1, [7])
    second.logprobs += [{}, {}]  # one for a token that is dropped
    later = planned(s)
    assert later.request_ids == [0, 1]
    s.retry(second)
    assert second.status is Status.RUNNING and not second.may_decode
    s.tokens_known(first, 1, [7])
    s.tokens_known(second, 1, [])
    s.retry(second)
    assert second.status is Status.WAITING and second.logprobs == [{}]
    plan = planned(s)
    check(s, plan)
    assert plan.request_ids == [1] and chunks(plan) == [(0, 10)]
    # blocks are shared again once they are new
    s.add(request(2, 9, token=5))
    assert chunks(planned(s)) == [(2 * BLOCK, 1)]


def test_no_preemption_while_tokens_are_in_flight() -> None:
    s = scheduler(num_blocks=1 + 4, enable_prefix_caching=False)
    for i in range(2):
        s.add(request(i, 8, 8))
    plans = []
    for _ in range(10):
        plan = s.schedule(may_preempt=False)
        if plan is None:
            break
        plans.append(plan)
    assert plan is None and s.num_preemptions == 0


def test_no_token_past_max_output_is_planned() -> None:
    s = scheduler()
    s.add(request(0, 3, 4))
    plans = []
    while (plan := s.schedule(may_preempt=False)) is not None:  # no step is answered
        plans.append(plan)
    assert [plan.is_prefill for plan in plans] == [PREFILL] + [DECODE] * 3


def test_finish_frees_waiting_running_and_half_prefilled_requests() -> None:
    s = scheduler(max_num_seqs=2)
    requests = [request(0, 4), request(1, 40), request(2, 4)]
    for one in requests:
        s.add(one)
    s.schedule(may_preempt=True)
    assert [one.status for one in requests] == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    for one in requests:
        s.finish(one, "abort")
    check(s, None)
    assert not s.has_work and s.cache.pool.num_free == 99 and len(s._free_rows) == 2


def test_restart_forgets_the_cache_and_keeps_the_order() -> None:
    s = scheduler(max_num_seqs=2)
    requests = [request(i, 8, token=7) for i in range(4)]
    for one in requests:
        s.add(one)
    answer(s, s.schedule(may_preempt=True))
    s.schedule(may_preempt=True)  # breaks off
    s.restart(requests)
    check(s, None)
    assert list(s.waiting) == requests and not s.running
    plan = planned(s)
    assert plan.is_prefill and chunks(plan)[0][0] == 0
    answer(s, plan)
    run(s)
    assert [len(one.output_ids) for one in requests] == [8] * 4


def test_equal_prompts_share_blocks_within_a_step() -> None:
    s = scheduler(max_num_batched_tokens=64)
    for i in range(3):
        s.add(request(i, 11, token=5))
    plan = planned(s)
    assert plan.is_prefill and chunks(plan) == [(0, 11), (8, 3), (8, 3)]
    assert len({tuple(one.blocks[0][:2]) for one in s.running}) == 1
    assert len({one.blocks[0][2] for one in s.running}) == 3


def test_what_else_decides_keys_and_values_parts_the_prefix_cache() -> None:
    """Requests with the same tokens share blocks only if their roots and contents are the same."""
    image, other = MMSpan(2, 3, b"i" * 32), MMSpan(2, 3, b"o" * 32)
    cases: list[tuple[bytes, tuple[MMSpan, ...]]] = [
        (b"", ()), (b"adapter", ()), (b"", (image,)), (b"", (other,)),
        (b"", (image._replace(start=3),)), (b"", (image._replace(start=4),)),
    ]  # fmt: skip
    s = scheduler(max_num_batched_tokens=512, max_num_seqs=16, max_prefill_rows=16)
    for i, (root, contents) in enumerate(cases * 2):
        one = request(i, 11, token=5)
        one.cache_root, one.contents = root, contents
        s.add(one)
    first = planned(s)
    # the first block ends before the image that starts at 4
    assert chunks(first)[: len(cases)] == [(0, 11)] * 5 + [(4, 7)]
    assert chunks(first)[len(cases) :] == [(8, 3)] * len(cases)


def test_proposals_are_fed_after_the_newest_token_as_far_as_there_is_room() -> None:
    s = scheduler(max_proposals=4, num_blocks=1 + 4)
    s.propose = lambda one: [70, 71, 72, 73, 74] if one.request_id == 0 else []
    s.add(request(0, 3, 5))
    s.add(request(1, 6, 8))
    answer(s, planned(s))
    plan = planned(s)
    # request 0 needs four more tokens: one follows its newest token, three follow proposals
    assert plan.num_tokens == [4, 1] and plan.token_T.tolist() == [NEWEST, 70, 71, 72, NEWEST]
    assert s.schedule(may_preempt=False) is not None, "request 1 goes on"
    answer(s, plan, lambda most: min(most, 2))
    assert s.known[0].num_computed == 5 and s.known[0].num_in_flight == 0
    assert len(s.known[0].output_ids) == 3


def test_tokens_that_the_device_proposes_are_planned_before_earlier_ones_are_known() -> None:
    s = scheduler(max_proposals=3)
    s.num_drafts = 3
    s.add(request(0, 3, 12))
    s.add(request(1, 6, 2))
    first = planned(s)
    # blocks are there for the draft after the prompt, as far as the answer may go
    assert [len(one.blocks[0]) * BLOCK for one in s.known.values()] == [8, 8]
    plans = [s.schedule(may_preempt=False) for _ in range(4)]
    assert plans[0] is not None and plans[1] is not None and plans[2] is not None
    # request 1 may have one more token: no draft follows it
    assert plans[0].token_T.tolist() == [NEWEST, DRAFT, DRAFT, DRAFT, NEWEST]
    assert plans[0].seq_lens == [7, 7]
    assert [plan.num_tokens for plan in plans[1:3] if plan] == [[4], [3]]
    assert plans[3] is None, "if every draft token is right, no token is left"
    one = s.known[0]
    assert (one.num_computed, one.num_in_flight) == (3 + 11, 12)
    assert len(one.blocks[0]) == 4 and not one.is_verifying
    answer(s, first)
    answer(s, plans[0], lambda most: 1)
    assert (one.num_computed, one.num_in_flight, len(one.output_ids)) == (11, 7, 2)
    again = s.schedule(may_preempt=False)
    assert again is not None and again.num_tokens == [3] and again.seq_lens == [14]


@pytest.mark.parametrize(
    ("params", "expected"),
    [({"presence_penalty": 1.0}, [3, 1]), ({"disable_spec_decode": True}, [3, 1]),
     ({"min_tokens": 5}, [3, 1]), ({"logprobs": 1}, [3, 3])],
)  # fmt: skip
def test_rows_whose_choices_depend_on_each_other_have_no_proposals(
    params: dict[str, Any], expected: list[int]
) -> None:
    s = scheduler(max_proposals=4)
    s.propose = lambda one: [70, 71]
    s.add(request(0, 3))
    s.add(request(1, 3))
    s.known[1].params = SamplingParams(max_tokens=8, **params)
    answer(s, planned(s))
    assert planned(s).num_tokens == expected


def test_log_probabilities_of_too_many_tokens_are_not_verified() -> None:
    s = scheduler(max_proposals=40)
    s.propose = lambda one: [70, 71]
    s.add(request(0, 3))
    s.known[0].params = SamplingParams(max_tokens=8, logprobs=1)
    answer(s, planned(s))
    assert planned(s).num_tokens == [1]


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("max_proposals", "on_device"), [(0, False), (5, False), (5, True)])
def test_random_loads_end_with_everything_free(
    seed: int, run_ahead: int, max_proposals: int, on_device: bool
) -> None:
    run_random_load(
        seed, 300, run_ahead=run_ahead, max_proposals=max_proposals, on_device=on_device
    )


def test_prefill_goes_on_if_decode_sends_back_its_only_row() -> None:
    """A better prompt is in chunked prefill when a watched request of a worse priority needs a
    block, and none is free."""
    s = scheduler(num_blocks=1 + 13, max_num_batched_tokens=4, enable_prefix_caching=False)
    watched, better = request(0, 4, 30), request(1, 40, 2)
    watched.incremental, better.priority = True, -1
    s.add(watched)
    answer(s, planned(s))
    s.add(better)
    plans = run(s)
    assert s.num_preemptions > 0 and not s.has_work
    assert [len(one.output_ids) for one in (watched, better)] == [30, 2]
    ends = [plan.seq_lens[plan.request_ids.index(1)] for plan in plans if 1 in plan.request_ids]
    assert ends == sorted(ends), "the better request was never sent back"
