"""Schedulers without a device, invariants of every plan, and random loads.

`python -m tests.schedule.loads 1000000` runs random loads for so many steps.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanovllm import SamplingParams
from nanovllm.schedule.blocks import BlockPool
from nanovllm.schedule.cache_groups import CacheGroups
from nanovllm.schedule.kv_cache_manager import KVCacheManager
from nanovllm.schedule.plan import PAD_BLOCK, StepPlan
from nanovllm.schedule.prefill_latency_bound import PrefillLatencyBound
from nanovllm.schedule.request import Request, Status
from nanovllm.schedule.scheduler import Scheduler

BLOCK = 4
MAX_TOKENS = 39  # of a request of a random load, its answer included
WINDOWS = [(0,), (0,), (5,), (0, 9), (0, 0, 3, 3), (12, 12), (0, 4, 11)]

PREFILL, DECODE = True, False


class Known(Scheduler):
    """A scheduler that remembers its requests by id, and fails where it would preempt forever."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.known: dict[int, Request] = {}
        self._most_preemptions = 0

    def schedule(self, *, may_preempt: bool) -> StepPlan | None:
        self._most_preemptions = self.num_preemptions + 100
        return super().schedule(may_preempt=may_preempt)

    def _preempt_last(self) -> None:
        assert self.num_preemptions < self._most_preemptions, "no end of preemptions"
        super()._preempt_last()

    def add(self, request: Request) -> None:
        self.known[request.request_id] = request
        super().add(request)


def scheduler(**changes: Any) -> Known:
    sizes = {
        "max_num_seqs": 8, "max_num_batched_tokens": 16, "max_decode_rows": 8,
        "max_prefill_rows": 8, **changes,
    }  # fmt: skip
    caching = sizes.pop("enable_prefix_caching", True)
    pool = BlockPool(sizes.pop("num_blocks", 100), BLOCK, enable_prefix_caching=caching)
    groups = CacheGroups(sizes.pop("windows", (0,)), BLOCK, sizes["max_num_batched_tokens"])
    return Known(KVCacheManager(pool, groups), **sizes)


def request(
    request_id: int, num_prompt: int, num_output: int = 8, *, token: int | None = None
) -> Request:
    prompt_ids = [1000 * request_id + i if token is None else token for i in range(num_prompt)]
    return Request(
        request_id, prompt_ids, SamplingParams(max_tokens=num_output), 0, num_output, frozenset()
    )


def planned(s: Known) -> StepPlan:
    plan = s.schedule(may_preempt=True)
    assert plan is not None
    return plan


def chunks(plan: StepPlan) -> list[tuple[int, int]]:
    """(position of the first token, number of tokens) of each row."""
    return [(end - num, num) for end, num in zip(plan.seq_lens, plan.num_tokens)]


def answer(
    s: Known, plan: StepPlan | None, num_right: Callable[[int], int] = lambda most: most
) -> None:
    """Give the scheduler a step's tokens as the engine does. Of n fed tokens `num_right(n)` are
    right."""
    assert plan is not None
    for request_id, num, wanted in zip(plan.request_ids, plan.num_tokens, plan.is_sampled):
        one, num_fed = s.known[request_id], 1 if plan.is_prefill else num
        if not wanted or one.status is Status.FINISHED:
            continue
        start = len(one.output_ids)
        s.tokens_known(one, num_fed, list(range(start, start + num_right(num_fed))))
        if len(one.output_ids) == one.max_output:
            s.finish(one, "length")


def check(s: Known, plan: StepPlan | None) -> None:
    """Check the invariants that hold after every plan."""
    refs: dict[int, int] = {}
    for one in s.running:
        assert one.status is Status.RUNNING and one.row >= 0
        assert len(one.blocks) == s.cache.num_groups
        # of this step, or of the next one if the request is not in this one
        first_query = one.num_computed - (one.num_in_flight - 1 if one.is_verifying else 0)
        first_query -= plan is not None and one.request_id in plan.request_ids
        for table, window in zip(one.blocks, s.cache.groups.windows):
            assert len(table) * BLOCK >= one.num_computed
            for idx, block in enumerate(table):
                if block != PAD_BLOCK:
                    refs[block] = refs.get(block, 0) + 1
                else:  # a failing request is computed again
                    is_seen = (idx + 1) * BLOCK > first_query - window + 1
                    assert window and (one.is_failing or not is_seen)
    assert 0 not in refs
    pool = s.cache.pool
    assert pool.num_free == pool.num_blocks - 1 - len(refs)
    assert all(pool._num_refs[block] == num for block, num in refs.items())
    rows = [one.row for one in s.running]
    assert len(set(rows)) == len(rows) and not set(rows) & set(s._free_rows)
    assert len(rows) + len(s._free_rows) == s.max_num_seqs
    assert all(
        one.status is Status.WAITING and not one.blocks and one.row == -1 for one in s.waiting
    )
    # those that are computed again after a NaN have lost their places
    in_order = [one for one in [*s.running, *s.waiting] if not one.no_sharing]
    for priority in {one.priority for one in in_order}:
        arrival = [one.request_id for one in in_order if one.priority == priority]
        assert arrival == sorted(arrival), "first come, first served"
    assert [one.priority for one in s.waiting] == sorted(one.priority for one in s.waiting)
    if plan is None:
        return
    requests = [s.known[request_id] for request_id in plan.request_ids]
    assert plan.rows == [one.row for one in requests] and len(set(plan.rows)) == len(requests)
    for row, group, block_idx, block in plan.new_blocks:
        (owner,) = [one for one in requests if one.row == row]
        assert owner.blocks[group][block_idx] == block
    if plan.is_prefill:
        assert 0 < sum(plan.num_tokens) == len(plan.token_T) <= s.max_num_batched_tokens
        assert all(num > 0 for num in plan.num_tokens)
        assert len(requests) <= s.max_prefill_rows
        known = [
            one.all_token_ids[start : start + num]
            for one, (start, num) in zip(requests, chunks(plan))
        ]
        assert plan.token_T.tolist() == [token for part in known for token in part]
        return
    assert 0 < len(requests) <= s.max_decode_rows
    assert plan.seq_lens == [one.num_computed for one in requests]
    assert all(one.num_scheduled_outputs <= one.max_output for one in requests)


def run(s: Known, *, run_ahead: int = 0, limit: int = 5000) -> list[StepPlan]:
    """Plan until no work is left; answer each step `run_ahead` steps later."""
    plans: list[StepPlan] = []
    in_flight: deque[StepPlan] = deque()
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


@dataclass
class SlowMask:
    """A constraint whose mask of allowed tokens is ready when the load says so."""

    is_ready: bool = True
    is_ended: bool = False
    is_slow: bool = False
    error: str | None = None
    num_forced: int = 0

    def push(self, token_id: int) -> None: ...

    def forced(self) -> list[int]:
        """Tokens that a step verifies; answers may have others."""
        return [7] * self.num_forced


class RandomLoad:
    """Requests of random lengths and priorities that arrive, end early, wait for masks, are
    computed again after a NaN, and start again after an error of a step."""

    def __init__(
        self, seed: int, *, run_ahead: int, max_proposals: int, on_device: bool = False
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.run_ahead = run_ahead
        windows = rng.choice(WINDOWS)
        step_tokens = rng.choice([1, 7, 32])
        groups = CacheGroups(windows, BLOCK, step_tokens)
        self.s = scheduler(
            windows=windows,
            num_blocks=1 + max(rng.choice([10, 14, 40]), groups.needed(MAX_TOKENS)),
            max_num_seqs=rng.choice([1, 4, 9]),
            max_decode_rows=rng.choice([1, 2, 8]),
            max_num_batched_tokens=step_tokens,
            max_prefill_rows=rng.choice([1, 3, 8]),
            enable_prefix_caching=rng.random() < 0.7,
            max_proposals=max_proposals,
            stall=rng.choice(
                [None, PrefillLatencyBound(rng.choice([0.1, 3.0]), ((4, 1.0), (32, 2.0)), 0.001)]
            ),
        )
        if on_device:
            self.s.num_drafts = max_proposals
        elif max_proposals:
            self.s.propose = lambda one: [9] * rng.randrange(8)
        self.num_priorities = rng.choice([1, 2, 5])
        self.in_flight: deque[StepPlan] = deque()
        self.num_requests = self.num_steps = 0

    def step(self) -> None:
        """Plan a step, and answer an earlier one, or this one."""
        s, rng = self.s, self.rng
        self.num_steps += 1
        if rng.random() < 0.02 and s.has_work:
            s.finish(rng.choice([*s.running, *s.waiting]), "abort")
        if rng.random() < 0.003:
            self.in_flight.clear()
            s.restart(one for one in s.known.values() if one.status is not Status.FINISHED)
        slow = [one.constraint for one in s.running if isinstance(one.constraint, SlowMask)]
        plan = s.schedule(may_preempt=not self.in_flight)
        check(s, plan)
        may_wait = self.in_flight or not s.has_work or not all(one.is_ready for one in slow)
        assert plan is not None or may_wait, "stuck"
        for one in slow:
            one.is_ready = one.is_ready or rng.random() < 0.3
        if plan is not None:
            self.in_flight.append(plan)
        if self.in_flight and (plan is None or len(self.in_flight) > self.run_ahead):
            self._answer(self.in_flight.popleft())

    def add(self) -> None:
        rng = self.rng
        one = request(
            self.num_requests, rng.randrange(1, 24), rng.randrange(1, MAX_TOKENS - 23),
            token=rng.choice([None, 1, 2]),
        )  # fmt: skip
        one.incremental = rng.random() < 0.3
        one.priority = rng.randrange(self.num_priorities)
        if rng.random() < 0.1:
            one.constraint = SlowMask()
        self.num_requests += 1
        self.s.add(one)

    def drain(self) -> None:
        """Run until no work is left. Everything is free then, and every answer is whole."""
        last = self.num_steps + 20_000
        while self.s.has_work or self.in_flight:
            assert self.num_steps < last, "no end"
            self.step()
        check(self.s, None)
        pool = self.s.cache.pool
        assert pool.num_free == pool.num_blocks - 1
        assert not any(pool._num_refs)
        for one in self.s.known.values():
            assert one.status is Status.FINISHED
            assert one.output_ids == list(range(len(one.output_ids)))
            assert one.finish_reason == "abort" or len(one.output_ids) == one.max_output
        self.s.known.clear()

    def _answer(self, plan: StepPlan) -> None:
        s, rng = self.s, self.rng
        for request_id, num, wanted in zip(plan.request_ids, plan.num_tokens, plan.is_sampled):
            one, num_fed = s.known[request_id], 1 if plan.is_prefill else num
            if not wanted or one.status is Status.FINISHED:
                continue
            if one.is_failing or (rng.random() < 0.01 and not one.no_sharing):
                s.tokens_known(one, num_fed, [])
                s.retry(one)
                continue
            start = len(one.output_ids)
            s.tokens_known(one, num_fed, list(range(start, start + rng.randint(1, num_fed))))
            if isinstance(one.constraint, SlowMask):
                one.constraint.is_ready = rng.random() < 0.5
                one.constraint.num_forced = rng.choice([0, 0, 1, 4, 9])
                one.constraint.is_slow = rng.random() < 0.1
                one.drafts = [5] * s.num_drafts
            if len(one.output_ids) == one.max_output:
                s.finish(one, "length")


def run_random_load(
    seed: int, num_steps: int, *, run_ahead: int, max_proposals: int, on_device: bool = False
) -> None:
    """Requests arrive for `num_steps` steps; then all of them must end. With `on_device` the device
    makes the proposals."""
    load = RandomLoad(seed, run_ahead=run_ahead, max_proposals=max_proposals, on_device=on_device)
    while load.num_steps < num_steps:
        if load.rng.random() < 0.3 and len(load.s.waiting) < 30:
            load.add()
        load.step()
    load.drain()


def main(num_steps: int, each: int = 1500) -> None:
    """Random loads of `each` steps, until there were `num_steps`; says which seeds fail."""
    num_seeds = -(-num_steps // each)
    failed = []
    for seed in range(num_seeds):
        try:
            run_random_load(
                seed, each, run_ahead=(0, 1, 3)[seed % 3], max_proposals=5 * (seed // 3 % 2),
                on_device=bool(seed // 6 % 2),
            )  # fmt: skip
        except AssertionError as error:
            failed.append(seed)
            print(f"seed {seed}: {error}")
    print(f"{num_seeds} loads of {each} steps or more: {len(failed)} failed {failed[:20]}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
