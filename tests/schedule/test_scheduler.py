"""Plans without a device: a loop that answers every planned token at once, or one step late, stands for the runner."""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import replace
from typing import Any

import pytest

from nanovllm import SamplingParams
from nanovllm.schedule.blocks import BlockPool
from nanovllm.schedule.request import Request, Status
from nanovllm.schedule.scheduler import DecodePlan, Plan, PrefillPlan, Scheduler
from nanovllm.schedule.stall import StallBound

BLOCK = 4


def scheduler(**changes: Any) -> Scheduler:
    sizes = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_decode_rows": 8,
        "max_prefill_rows": 8,
        **changes,
    }
    caching = sizes.pop("enable_prefix_caching", True)
    return Scheduler(
        BlockPool(sizes.pop("num_blocks", 100), BLOCK, enable_prefix_caching=caching), **sizes
    )


def request(
    request_id: int, num_prompt: int, num_output: int = 8, *, token: int | None = None
) -> Request:
    prompt_ids = [1000 * request_id + i if token is None else token for i in range(num_prompt)]
    return Request(
        request_id, prompt_ids, SamplingParams(max_tokens=num_output), 0, num_output, frozenset()
    )


def sampled(plan: Plan) -> list[Request]:
    if isinstance(plan, DecodePlan):
        return plan.requests
    return [chunk.request for chunk in plan.chunks if chunk.is_last]


def answer(s: Scheduler, plan: Plan) -> None:
    """What the engine does when a step's tokens are known."""
    for one in sampled(plan):
        one.num_in_flight -= 1
        if one.status is Status.FINISHED:
            continue
        one.output_ids.append(len(one.output_ids))
        s.token_known(one)
        if len(one.output_ids) == one.max_output:
            s.finish(one, "length")


def check(s: Scheduler, plan: Plan | None) -> None:
    """What must hold after every plan."""
    refs: dict[int, int] = {}
    for one in s.running:
        assert one.status is Status.RUNNING and one.row >= 0
        assert len(one.blocks) * BLOCK >= one.num_computed
        for block in one.blocks:
            refs[block] = refs.get(block, 0) + 1
    assert 0 not in refs
    assert s.pool.num_free == s.pool.num_blocks - 1 - len(refs)
    assert all(s.pool._num_refs[block] == num for block, num in refs.items())
    rows = [one.row for one in s.running]
    assert len(set(rows)) == len(rows) and not set(rows) & set(s._free_rows)
    assert len(rows) + len(s._free_rows) == s.max_num_seqs
    assert all(
        one.status is Status.WAITING and not one.blocks and one.row == -1 for one in s.waiting
    )
    arrival = [one.request_id for one in [*s.running, *s.waiting]]
    assert arrival == sorted(arrival), "first come, first served"
    if isinstance(plan, PrefillPlan):
        assert 0 < sum(chunk.num_tokens for chunk in plan.chunks) <= s.max_num_batched_tokens
        assert all(chunk.num_tokens > 0 for chunk in plan.chunks)
        assert len(plan.chunks) <= s.max_prefill_rows
    elif plan is not None:
        assert 0 < len(plan.requests) <= s.max_decode_rows
        assert len({one.request_id for one in plan.requests}) == len(plan.requests)
        assert all(one.num_computed <= len(one.blocks) * BLOCK for one in plan.requests)
        for row, block_idx, block in plan.new_blocks:
            (owner,) = [one for one in plan.requests if one.row == row]
            assert owner.blocks[block_idx] == block


def run(s: Scheduler, *, run_ahead: int = 0, limit: int = 5000) -> list[Plan]:
    """Plan until nothing is left, each step answered `run_ahead` steps late."""
    plans: list[Plan] = []
    in_flight: deque[Plan] = deque()
    for _ in range(limit):
        if not s.has_work and not in_flight:
            return plans
        plan = s.schedule(may_preempt=not in_flight)
        check(s, plan)
        if plan is not None:
            plans.append(plan)
            in_flight.append(plan)
        assert plan is not None or in_flight, "stuck"
        if plan is None or len(in_flight) > run_ahead:
            answer(s, in_flight.popleft())
    raise AssertionError("no end")


def test_prompts_are_packed_in_order_of_arrival() -> None:
    s = scheduler()
    for i, num in enumerate((5, 6, 9, 3)):
        s.add(request(i, num))
    plan = s.schedule(may_preempt=True)
    assert isinstance(plan, PrefillPlan)
    assert [(c.request.request_id, c.start, c.num_tokens, c.is_last) for c in plan.chunks] == [
        (0, 0, 5, True),
        (1, 0, 6, True),
        (2, 0, 5, False),
    ]


def test_a_long_prompt_is_split_and_the_rest_of_the_budget_goes_to_the_next() -> None:
    s = scheduler()
    s.add(request(0, 40))
    s.add(request(1, 20))
    chunks = []
    for _ in range(4):
        plan = s.schedule(may_preempt=True)
        assert isinstance(plan, PrefillPlan)
        chunks.append(
            [(c.request.request_id, c.start, c.num_tokens, c.is_last) for c in plan.chunks]
        )
        if len(chunks) == 3:
            break
    assert chunks == [
        [(0, 0, 16, False)],
        [(0, 16, 16, False)],
        [(0, 32, 8, True), (1, 0, 8, False)],
    ]


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_watched_request_waits_for_one_prefill_step_at_most(run_ahead: int) -> None:
    s = scheduler()
    s.add(request(0, 4, 30))
    s.waiting[-1].incremental = True
    answer(s, s.schedule(may_preempt=True))
    s.add(request(1, 150, 2))
    kinds = [type(plan) for plan in run(s, run_ahead=run_ahead)]
    assert kinds.count(PrefillPlan) == 10
    pairs = list(itertools.pairwise(kinds))
    assert (PrefillPlan, PrefillPlan) not in pairs, (
        "a decodable request waited for two prefill steps"
    )
    # and the prompt does not wait for more than one decode step
    last = max(i for i, kind in enumerate(kinds) if kind is PrefillPlan)
    assert (DecodePlan, DecodePlan) not in pairs[:last]


def test_prompts_go_first_when_nobody_watches() -> None:
    s = scheduler()
    s.add(request(0, 4, 30))
    answer(s, s.schedule(may_preempt=True))
    s.add(request(1, 150, 2))
    kinds = [type(plan) for plan in run(s)]
    assert kinds[:10] == [PrefillPlan] * 10 and kinds.count(PrefillPlan) == 10


# a step of a small model on a large GPU; a chunk of 8192 after 8192 others would take 15 + 50 ms
STALL = StallBound(30.0, ((32, 2.0), (128, 2.0), (512, 2.5), (2048, 4.5), (8192, 15.0)), 5e-7)


def with_long_prompt(
    stall: StallBound, *, watched: bool, **changes: Any
) -> tuple[Scheduler, list[Plan], list[float]]:
    """Eight requests decode when a prompt of 16,384 tokens comes; all plans from then on, and what the prefill steps
    take by the estimate."""
    sizes = {"num_blocks": 6000, "max_num_seqs": 16, "max_num_batched_tokens": 8192, **changes}
    s = scheduler(stall=stall, **sizes)
    for i in range(8):
        s.add(request(i, 4, 600))
        s.waiting[-1].incremental = watched and i == 3
    answer(s, s.schedule(may_preempt=True))
    s.add(request(8, 16_384, 2))
    s.add(request(9, 100, 2))
    plans = run(s)
    prefills = [plan for plan in plans if isinstance(plan, PrefillPlan)]
    assert sum(chunk.num_tokens for plan in prefills for chunk in plan.chunks) == 16_484
    return (
        s,
        plans,
        [stall.estimate([(c.num_tokens, c.start) for c in plan.chunks]) for plan in prefills],
    )


@pytest.mark.parametrize("max_ms", [5.0, 10.0, 30.0, 60.0])
def test_prefill_steps_stay_within_the_bound_while_tokens_are_watched(max_ms: float) -> None:
    _, plans, times = with_long_prompt(replace(STALL, max_ms=max_ms), watched=True)
    assert all(ms <= max_ms for ms in times)
    kinds = [type(plan) for plan in plans]
    assert (PrefillPlan, PrefillPlan) not in list(itertools.pairwise(kinds))


def test_the_bound_costs_few_steps() -> None:
    _, _, times = with_long_prompt(STALL, watched=True)
    assert len(times) <= 9, "eight full buckets of 2048, and what is left"


def test_a_prompt_ends_whatever_the_bound() -> None:
    _, plans, times = with_long_prompt(replace(STALL, max_ms=0.001), watched=True)
    assert len(times) == 16_384 // 32 + 4
    assert all(
        sum(c.num_tokens for c in p.chunks) <= 32 for p in plans if isinstance(p, PrefillPlan)
    )


def test_a_batch_that_nobody_watches_is_not_cut() -> None:
    _, plans, times = with_long_prompt(STALL, watched=False)
    sizes = [
        sum(chunk.num_tokens for chunk in plan.chunks)
        for plan in plans
        if isinstance(plan, PrefillPlan)
    ]
    assert sizes == [8192, 8192, 100] and max(times) > STALL.max_ms


def test_nobody_waits_for_a_prompt_that_is_alone() -> None:
    s = scheduler(stall=STALL, num_blocks=6000, max_num_batched_tokens=8192)
    s.add(request(0, 16_384))
    s.waiting[0].incremental = True
    plan = s.schedule(may_preempt=True)
    assert isinstance(plan, PrefillPlan) and plan.chunks[0].num_tokens == 8192


def test_rows_that_decode_in_turns_share_the_bound() -> None:
    _, _, times = with_long_prompt(STALL, watched=True, max_decode_rows=3)
    assert max(times) <= 10.0


def test_prefill_goes_first_when_nothing_decodes() -> None:
    s = scheduler()
    s.add(request(0, 40))
    assert [type(s.schedule(may_preempt=True)) for _ in range(3)] == [PrefillPlan] * 3


def test_a_request_that_does_not_fit_holds_back_those_behind_it() -> None:
    s = scheduler(num_blocks=1 + 8)
    s.add(request(0, 16, 10))
    answer(s, s.schedule(may_preempt=True))
    s.add(request(1, 24, 1))  # 6 blocks of which 4 are free
    s.add(request(2, 1))
    answer(s, s.schedule(may_preempt=True))
    assert [one.request_id for one in s.running] == [0] and [
        one.request_id for one in s.waiting
    ] == [1, 2]
    plans = run(s)
    first = [
        one.request_id for plan in plans for one in sampled(plan) if isinstance(plan, PrefillPlan)
    ]
    assert first == [1, 2]


def test_no_more_than_max_num_seqs_run() -> None:
    s = scheduler(max_num_seqs=3)
    for i in range(7):
        s.add(request(i, 2, 3))
    plans = run(s)
    assert max(len(plan.requests) for plan in plans if isinstance(plan, DecodePlan)) == 3


def test_no_more_than_max_prefill_rows_share_a_step() -> None:
    s = scheduler(max_prefill_rows=2)
    for i in range(5):
        s.add(request(i, 2, 1))
    assert [len(plan.chunks) for plan in run(s) if isinstance(plan, PrefillPlan)] == [2, 2, 1]


def test_more_requests_than_decode_rows_take_turns() -> None:
    s = scheduler(max_decode_rows=3, max_num_batched_tokens=64)
    for i in range(8):
        s.add(request(i, 2, 13))
    decodes = [
        [one.request_id for one in plan.requests] for plan in run(s) if isinstance(plan, DecodePlan)
    ]
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
    """The newest has its turn alone, finds no block and is preempted: the step goes to somebody else."""
    s = scheduler(num_blocks=1 + 4, max_decode_rows=1, enable_prefix_caching=False)
    s.add(request(0, 4, 9))
    s.add(request(1, 4, 9))
    run(s)
    assert s.num_preemptions > 0


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
    while (plan := s.schedule(may_preempt=False)) is not None:  # nothing is ever answered
        plans.append(plan)
    assert [type(plan) for plan in plans] == [PrefillPlan] + [DecodePlan] * 3


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
    assert not s.has_work and s.pool.num_free == 99 and len(s._free_rows) == 2


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
    plan = s.schedule(may_preempt=True)
    assert isinstance(plan, PrefillPlan) and plan.chunks[0].start == 0
    answer(s, plan)
    run(s)
    assert [len(one.output_ids) for one in requests] == [8] * 4


def test_equal_prompts_share_blocks_within_a_step() -> None:
    s = scheduler(max_num_batched_tokens=64)
    for i in range(3):
        s.add(request(i, 11, token=5))
    plan = s.schedule(may_preempt=True)
    assert isinstance(plan, PrefillPlan)
    assert [(c.start, c.num_tokens) for c in plan.chunks] == [(0, 11), (8, 3), (8, 3)]
    assert len({tuple(c.request.blocks[:2]) for c in plan.chunks}) == 1
    assert len({c.request.blocks[2] for c in plan.chunks}) == 3


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_random_loads_end_with_everything_free(seed: int, run_ahead: int) -> None:
    rng = random.Random(seed)
    s = scheduler(
        num_blocks=1 + rng.choice([10, 14, 40]),
        max_num_seqs=rng.choice([1, 4, 9]),
        max_decode_rows=rng.choice([1, 2, 8]),
        max_num_batched_tokens=rng.choice([1, 7, 32]),
        max_prefill_rows=rng.choice([1, 3, 8]),
        enable_prefix_caching=rng.random() < 0.7,
        stall=rng.choice([None, StallBound(rng.choice([0.1, 3.0]), ((4, 1.0), (32, 2.0)), 0.001)]),
    )
    lengths = [(rng.randrange(1, 24), rng.randrange(1, 16)) for _ in range(30)]
    requests = [
        request(i, p, o, token=rng.choice([None, 1, 2])) for i, (p, o) in enumerate(lengths)
    ]
    for one in requests:
        one.incremental = rng.random() < 0.3
    todo = deque(requests)
    in_flight: deque[Plan] = deque()
    steps = 0
    while todo or s.has_work or in_flight:
        steps += 1
        assert steps < 20_000
        if todo and rng.random() < 0.3:
            s.add(todo.popleft())
        if rng.random() < 0.02 and s.has_work:
            s.finish(rng.choice([*s.running, *s.waiting]), "abort")
        plan = s.schedule(may_preempt=not in_flight)
        check(s, plan)
        assert plan is not None or in_flight or not s.has_work, "stuck"
        if plan is not None:
            in_flight.append(plan)
        if in_flight and (plan is None or len(in_flight) > run_ahead):
            answer(s, in_flight.popleft())
    check(s, None)
    assert s.pool.num_free == s.pool.num_blocks - 1 and not any(s.pool._num_refs)
    for one, (_, num_output) in zip(requests, lengths):
        assert one.status is Status.FINISHED
        assert one.finish_reason == "abort" or len(one.output_ids) == num_output
