"""Chooses the tokens of each step. Works on requests, rows and blocks, without tensors.

First come, first served, by priority. A step is either a prefill step (chunks of prompts, at most
`max_num_batched_tokens` tokens) or a decode step (the newest token of each of at most
`max_decode_rows` rows, and proposals for the tokens after it). While a running request is streamed
(`Request.incremental`), prefill and decode steps take turns and a time bound
(`PrefillLatencyBound`) limits each prefill step: a long prompt delays the next token by at most one
short prefill step. Otherwise prefill goes first without a bound: the whole batch finishes sooner.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice

from nanovllm.schedule.adapter_slots import AdapterSlots
from nanovllm.schedule.batch_builder import Chunk, decode_plan, prefill_plan, sampling_metadata
from nanovllm.schedule.draft_planner import DraftCounts, DraftPlanner
from nanovllm.schedule.kv_cache_manager import KVCacheManager
from nanovllm.schedule.past_answers import PastAnswers
from nanovllm.schedule.plan import DRAFT, MOST_MASKED, NO_DRAFTS, NewBlock, StepPlan
from nanovllm.schedule.prefill_latency_bound import PrefillLatencyBound
from nanovllm.schedule.request import Request, Status

# How many requests may pass one that waits for a slot, and how far one may be behind it.
MAX_PASSED = 256
# Prefill steps that may precede decode steps while requests could decode: with the rows of all
# prompts decode steps cost less. After so many without a pause the two take turns.
PREFILLS_FIRST = 32

Proposer = Callable[[Request], Sequence[int]]


# Rows with log-probabilities of a step at most, if that is more than those of a decode step
VERIFIED_LOGPROBS = 32


class Scheduler:
    def __init__(
        self,
        cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_decode_rows: int,
        max_prefill_rows: int,
        stall: PrefillLatencyBound | None = None,
        max_proposals: int = 0,
    ) -> None:
        """`propose`, if set, is called for requests whose tokens are all known, and at most
        `max_proposals` of its tokens are used. Requests that do not take them have none
        (`Request.takes_drafts`).

        Without it, `num_drafts` tokens that the device has left in its state are proposed: then the
        next step need not wait for the tokens of this one. With a `planner` it is up to so many, as
        many as pay. Requests with adapters need `adapters`.
        """
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_decode_rows = max_decode_rows
        self.max_prefill_rows = max_prefill_rows
        self.stall = stall
        self.max_proposals = max_proposals
        self._most_logits = max(max_decode_rows, VERIFIED_LOGPROBS)
        self.adapters: AdapterSlots | None = None
        self.keeps_images_whole = False  # tokens of an image need all of it in their step
        self.propose: Proposer | None = None
        self.num_drafts = 0
        self.has_known = False  # see `prefill_plan`
        self.planner: DraftPlanner | None = None
        self.past: PastAnswers | None = None  # for a proposer that looks in earlier answers
        self.counts = DraftCounts()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self.num_preemptions = 0
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._prefill_was_last = False
        self._prefills_left = PREFILLS_FIRST
        self._next_decode = 0  # the decodable request to begin with if they need several steps

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request behind those of the same priority."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > request.priority:
            place -= 1
        self.waiting.insert(place, request)

    def finish(self, request: Request, reason: str) -> None:
        """Free a request's row and blocks. Steps in flight may still write to the blocks, but they
        run before any step that reuses the blocks."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self._vacate(request)
        if self.past is not None and not request.cache_root:  # no salt or adapter
            self.past.add(request.output_ids)
        request.status = Status.FINISHED
        request.finish_reason = reason

    def restart(self, requests: Iterable[Request]) -> None:
        """Restart with `requests`: all unfinished ones, oldest first.

        Used after an error in a step, when the cache's content and its records may differ.
        """
        self.cache.reset()
        if self.adapters is not None:
            self.adapters.reset()
        self.running = []
        self.waiting = deque(sorted(requests, key=lambda request: request.priority))
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))
        for request in self.waiting:
            request.restart()

    def retry(self, request: Request) -> None:
        """Compute a request again from its known tokens, without shared blocks and proposals.

        Its blocks are no longer shared. It waits until none of its tokens is in flight.
        """
        request.is_failing = request.no_sharing = True
        self.cache.evict([request])
        if not request.num_in_flight:
            self._send_back(request)

    def schedule(self, *, may_preempt: bool) -> StepPlan | None:
        """The next step, or None if no request can run before the tokens in flight are known.

        `may_preempt` must be False while steps are in flight: a preempted request restarts from its
        known tokens.
        """
        decodable = [request for request in self.running if request.may_decode]
        alternates = self._prefills_left <= 0 or any(one.incremental for one in decodable)
        is_decodes_turn = self._prefill_was_last and alternates and bool(decodable)
        plan = None if is_decodes_turn else self._plan_prefill(self._max_prefill_ms(decodable))
        if plan is None:
            plan = self._decode(decodable, may_preempt)
        if plan is None and may_preempt:
            # decode has preempted all its rows: prompts of better priorities have their blocks now
            plan = self._plan_prefill(math.inf)
            while plan is None and not all(request.is_decoding for request in self.running):
                self._preempt_last()  # every prompt waits for blocks that the others have
                plan = self._plan_prefill(math.inf)
        self._prefill_was_last = plan is not None and plan.is_prefill
        if self._prefill_was_last and decodable:
            self._prefills_left -= 1
        if plan is not None and self.adapters is not None and self.adapters.loads:
            plan = replace(plan, adapters=self.adapters.take_loads())
        if plan is not None and self.past is not None:
            plan = replace(plan, past=self.past.take())
        return plan

    def tokens_known(self, request: Request, num_fed: int, token_ids: Sequence[int]) -> None:
        """Append the new tokens from a step that fed `num_fed` tokens of this request, and publish
        the blocks that are now full of known tokens."""
        num_wrong = num_fed - len(token_ids)
        request.num_computed -= num_wrong
        request.num_in_flight -= num_fed
        request.is_verifying = False
        request.output_ids += token_ids
        num_full = min(request.num_known, request.num_computed) // self.cache.block_size
        if num_full > len(request.block_digests) and self.cache.pool.enable_prefix_caching:
            self.cache.cache_blocks(request, num_full)

    def _max_prefill_ms(self, decodable: list[Request]) -> float:
        """The time bound of the next prefill step, in milliseconds.

        The prefill steps between two tokens of one request share `PrefillLatencyBound.max_ms`.
        """
        if self.stall is None or not any(request.incremental for request in decodable):
            return math.inf
        return self.stall.max_ms / -(-len(decodable) // self.max_decode_rows)

    def _plan_prefill(self, max_ms: float) -> StepPlan | None:
        begun = [request for request in self.running if not request.is_decoding]
        if not begun and not self.waiting:
            self._prefills_left = PREFILLS_FIRST
            return None
        self.cache.begin_step()
        budget = self.max_num_batched_tokens
        num_left = self._num_prompt_tokens(begun) if max_ms < math.inf else 0
        chunks: list[Chunk] = []
        for request in begun:
            if budget and len(chunks) < self.max_prefill_rows:
                num_left -= request.num_known - request.num_computed
                budget -= self._add_chunk(chunks, request, budget, max_ms, num_left)
        while budget and self._free_rows and len(chunks) < self.max_prefill_rows:
            place = self._next_place()
            if place is None or not self._admit(self.waiting[place]):
                break
            request = self.waiting[place]
            del self.waiting[place]
            for passed in islice(self.waiting, place):
                passed.num_passed += 1
            num_left -= request.num_known
            budget -= self._add_chunk(chunks, request, budget, max_ms, num_left)
        return prefill_plan(chunks, has_known=self.has_known) if chunks else None

    def _num_prompt_tokens(self, begun: list[Request]) -> int:
        """About how many tokens wait for the next prefill step: what is left of the prompts in
        `begun`, and the waiting prompts for which there are rows and blocks.

        It counts tokens of waiting prompts even if they are in the cache: only admission finds out.
        """
        num_tokens = sum(request.num_known - request.num_computed for request in begun)
        num_free = self.cache.pool.num_free - len(self.running) * self.cache.num_groups
        for request in islice(self.waiting, min(len(self._free_rows), self.max_prefill_rows)):
            num_free -= self.cache.groups.needed(request.num_known)
            if num_free < 0:
                break
            num_tokens += request.num_known
        return num_tokens

    def _add_chunk(
        self, chunks: list[Chunk], request: Request, budget: int, max_ms: float, num_left: int
    ) -> int:
        """Add a chunk of a request as large as fits; returns the number of tokens to take off the
        budget: all of it if the step has no time left, 0 if the request must wait for blocks. About
        `num_left` tokens of other prompts may follow in the step."""
        num_tokens = min(request.num_known - request.num_computed, budget)
        if self.stall is not None and max_ms < math.inf:
            before = [(chunk.num_tokens, chunk.start) for chunk in chunks]
            wanted = num_tokens, request.num_computed
            num_tokens = self.stall.next_chunk(before, wanted, max_ms, max(0, num_left))
            if not num_tokens:
                return budget
        least = 1
        if self.keeps_images_whole:  # even if the step takes longer
            num_tokens = request.whole(num_tokens, budget)
            if not num_tokens:
                return budget
            least = request.whole(least, num_tokens)
        num_tokens = self.cache.extend(request, num_tokens, len(self.running), least)
        num_tokens = self.cache.cut(request, num_tokens)
        if self.keeps_images_whole:
            num_tokens = request.whole(num_tokens, num_tokens)
        if not num_tokens:
            return 0
        start, is_first = request.num_computed, request.num_computed == request.num_shared
        is_last = start + num_tokens == request.num_known
        request.num_computed += num_tokens
        request.is_decoding = is_last
        request.num_in_flight += is_last
        # Steps run in order, and a layer stores all keys of a step before its attention: later
        # requests of this step may already share these blocks.
        self.cache.cache_blocks(request, request.num_computed // self.cache.block_size)
        slots = self.cache.restored(request), self.cache.take_snapshot(request)
        new_blocks, request.new_blocks = request.new_blocks, []
        chunks.append(Chunk(request, start, num_tokens, is_first, is_last, new_blocks, *slots))
        return num_tokens

    def _next_place(self) -> int | None:
        """The place in the queue of the next request to admit: the first, unless it needs a slot
        for its adapter and running requests use all of them.

        Then later requests pass it, but only so often that it does not wait forever.
        """
        if not self.waiting or self.adapters is None:
            return 0 if self.waiting else None
        for place, request in enumerate(islice(self.waiting, MAX_PASSED)):
            if not request.adapter_id or self.adapters.has_room(request.adapter_id):
                return place
            if request.num_passed >= MAX_PASSED:
                break
        return None

    def _admit(self, request: Request) -> bool:
        """Give a waiting request a row and blocks for all its known tokens, cached blocks first,
        and its adapter a slot, which is free.

        Returns False if there are too few free blocks.
        """
        if not self.cache.admit(request, self._num_reached(request), len(self.running)):
            return False
        if request.adapter_id:
            assert self.adapters is not None
            request.adapter, request.num_passed = self.adapters.take(request.adapter_id), 0
        if request.num_cached is None:
            request.num_cached = request.num_computed
        request.row = self._free_rows.pop()
        request.status = Status.RUNNING
        self.running.append(request)
        return True

    def _decode(self, decodable: list[Request], may_preempt: bool) -> StepPlan | None:
        """The next decode step; None if no row can decode, or none without preemption."""
        while decodable:
            num_preemptions = self.num_preemptions
            plan = self._plan_decode(decodable, may_preempt)
            if plan is not None or self.num_preemptions == num_preemptions:
                return plan
            # all chosen requests were preempted: older requests have their blocks now
            decodable = [request for request in self.running if request.may_decode]
        return None

    def _plan_decode(self, decodable: list[Request], may_preempt: bool) -> StepPlan | None:
        if len(decodable) > self.max_decode_rows:
            start = self._next_decode % len(decodable)
            decodable = (decodable[start:] + decodable[:start])[: self.max_decode_rows]
            self._next_decode = start + self.max_decode_rows
        short = [request for request in decodable if self.cache.needs_blocks(request)]
        for request in short:  # tokens in flight may be drafts that are rejected
            self.cache.trim(request, request.num_known - 1)
        if not may_preempt and not self.cache.has_room(len(short)):
            return None
        new_blocks: list[NewBlock] = []
        for request in short:
            if request.status is not Status.RUNNING:
                continue  # preempted for an older request
            self._make_room(request)
            if request.status is Status.RUNNING:  # it was not the newest itself
                new_blocks += self.cache.add_blocks(request)
        # an older request may have preempted some, also after they were given blocks
        chosen = [request for request in decodable if request.status is Status.RUNNING]
        if not chosen:
            return None
        rows = {request.row for request in chosen}
        new_blocks = [new for new in new_blocks if new[0] in rows]
        for request in chosen:
            request.num_computed += 1
            request.num_in_flight += 1
        return self._verifying_plan(chosen, new_blocks)

    def _verifying_plan(self, chosen: list[Request], new_blocks: list[NewBlock]) -> StepPlan:
        """The plan of a decode step, with proposals for the rows that take them, if those of the
        device pay."""
        sampling, planner, num = sampling_metadata(chosen), self.planner, self.num_drafts
        proposes = self.propose is not None
        taking = [self._takes_drafts(one) for one in chosen] if num or proposes else []
        forced = self._forced(chosen) if self.max_proposals and sampling.masked else []
        if sampling.needs_host and len(chosen) * (1 + self.max_proposals) > self._most_logits:
            taking, forced = [], []  # log-probabilities of so many would take too much memory
        if not (any(taking) or any(forced)) or proposes:
            num = 0
        elif planner is not None:
            nums = [len(one) for one in forced] or [0] * len(chosen)
            others = sum(takes and not known for takes, known in zip(taking, nums))
            num = planner.lengths.choose(len(chosen), others, nums, bool(sampling.masked))
            forced = [one[:num] for one in forced]
        drafts = NO_DRAFTS if planner is None else planner.plan(chosen, num)
        proposals: list[Sequence[int]] = []
        if any(forced) or (any(taking) and (num or proposes)):
            forced = forced or [()] * len(chosen)
            taking = taking or [False] * len(chosen)
            proposals = [
                self._proposals(request, new_blocks, num, known) if takes or known else ()
                for request, takes, known in zip(chosen, taking, forced, strict=True)
            ]
            self.counts.num_undrafted += sum(not (a or b) for a, b in zip(taking, forced))
        if planner is not None and num:
            planner.planned(chosen, num)
        if self.max_proposals:
            self.counts.steps[max(map(len, proposals), default=0)] += 1
        return decode_plan(chosen, proposals, new_blocks, sampling, drafts)

    def _takes_drafts(self, request: Request) -> bool:
        """Whether a step may verify drafts of a proposer for it."""
        return request.takes_drafts or (request.takes_masked and not request.drafts_ended)

    def _forced(self, chosen: list[Request]) -> list[Sequence[int]]:
        """The tokens that each request's grammar forces, as many as a step may verify."""
        most = min(self.max_proposals, MOST_MASKED)
        return [
            one.constraint.forced()[:most] if one.constraint and one.takes_masked else ()
            for one in chosen
        ]

    def note_accepted(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """Record how many of a request's proposed tokens a step has accepted."""
        self.counts.note(num_drafts, num_accepted)
        self.counts.num_forced_tokens += min(num_accepted, request.num_forced)
        if self.planner is not None and not request.num_forced:
            self.planner.lengths.note_accepted(num_drafts, num_accepted)

    def _proposals(
        self,
        request: Request,
        new_blocks: list[NewBlock],
        num_drafts: int,
        forced: Sequence[int] = (),
    ) -> Sequence[int]:
        """The proposed tokens after a request's newest, as many as blocks and its length allow:
        those of the host, or `num_drafts` of the device, unless others are `forced`. Those of a
        request with a grammar are known, since masks depend on them.

        They count as computed and in flight until `tokens_known` gets the accepted ones.
        """
        num_ready, request.num_forced = num_drafts, len(forced)
        if self.planner is not None:
            num_ready = self.planner.num_ready(request, num_drafts)
        if request.no_sharing or (self.propose is not None and request.num_in_flight > 1):
            return ()
        proposed: Sequence[int] = (DRAFT,) * num_ready
        if self.propose is not None:
            proposed = self.propose(request)
        elif request.constraint is not None:
            proposed = request.drafts[:num_ready]
        if request.constraint is not None:
            is_forced = list(proposed[: len(forced)]) != list(forced)
            proposed = (forced if is_forced else proposed)[:MOST_MASKED]
        num_left = request.max_output - request.num_scheduled_outputs
        proposed = proposed[: min(self.max_proposals, num_left)]
        for num, _ in enumerate(proposed):
            if self.cache.needs_blocks(request):
                self.cache.trim(request, request.num_known - 1)
                if not self.cache.has_room():
                    return proposed[:num]
                new_blocks += self.cache.add_blocks(request)
            request.num_computed += 1
            request.num_in_flight += 1
            request.is_verifying = self.propose is not None
        if self.propose is None and num_drafts:
            new_blocks += self.cache.add_ahead(request, self._num_reached(request))
        return proposed

    def _num_reached(self, request: Request) -> int:
        """The tokens for which a request needs blocks: those fed, and those that the device drafts
        after them."""
        longest = len(request.prompt_ids) + request.max_output
        fed = request.num_computed if request.row >= 0 else request.num_known
        return min(fed + self.num_drafts, longest)

    def _make_room(self, request: Request) -> None:
        """Preempt requests until there are blocks for `request`, or it is preempted itself."""
        while not self.cache.has_room() and request.status is Status.RUNNING:
            self._preempt_last()

    def _preempt_last(self) -> None:
        """Preempt the request of the highest priority number, and of these the newest."""
        self._send_back(max(reversed(self.running), key=lambda other: other.priority))
        self.num_preemptions += 1

    def _send_back(self, request: Request) -> None:
        """Preempt a running request: it waits again, before the others of its priority."""
        self._vacate(request)
        request.restart()
        num_before = sum(other.priority < request.priority for other in self.waiting)
        self.waiting.insert(num_before, request)

    def _vacate(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.release(request)
        if self.adapters is not None:
            self.adapters.release(request.adapter)
            request.adapter = 0
        self._free_rows.append(request.row)
        request.row = -1
