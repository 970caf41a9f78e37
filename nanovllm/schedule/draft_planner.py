"""The drafts of each decode step: how many, of which rows, and what a second model reads first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from nanovllm.schedule.draft_length import DraftLengths
from nanovllm.schedule.plan import NO_DRAFTS, DraftReading, StepDrafts
from nanovllm.schedule.request import Request


class DraftPlanner:
    """Chooses the number of draft tokens of steps whose proposer adapts.

    A proposer that `varies` drafts after verifying steps alone. One that also `rests` does not run
    in plain steps: their rows are behind (`Request.num_drafted`). Before they have drafts again it
    reads the missing tokens, of up to `max_rows` rows and `max_tokens` tokens in a step. One that
    cannot read them later reads on, unless that costs too much: then the drafts of rows of plain
    steps end for good (`Request.drafts_ended`).
    """

    def __init__(
        self, lengths: DraftLengths, *, varies: bool, rests: bool, max_rows: int, max_tokens: int
    ) -> None:
        self.lengths, self.varies, self.rests = lengths, varies, rests
        self._max_rows, self._max_tokens = max_rows, max_tokens

    def num_ready(self, request: Request, num_drafts: int) -> int:
        """How many of up to `num_drafts` draft tokens in the state follow a row's newest token."""
        return min(num_drafts, request.num_ready) if self.varies else num_drafts

    def plan(self, requests: Sequence[Request], num_drafts: int) -> StepDrafts:
        """Note a step of `requests` that verifies up to `num_drafts` tokens a row, after their
        newest tokens were counted as computed."""
        if not self.varies:
            return NO_DRAFTS
        readings: list[DraftReading] = []
        num_left = self._max_tokens
        for request in requests:
            end = request.num_computed - 1
            if not num_drafts:
                request.num_ready = 0
                if self.rests and request.num_drafted is None:
                    # of verified tokens in flight fewer may be accepted
                    request.num_drafted = min(end, request.num_known)
                continue
            start = request.num_drafted
            if start is None or not (request.takes_drafts or request.takes_masked):
                continue
            # while verified tokens are in flight, the positions of later ones are not known
            if end <= request.num_known and end - start <= num_left:
                if end > start and len(readings) == self._max_rows:
                    continue
                request.num_drafted = None
                if end > start:
                    num_left -= end - start
                    token_ids = request.all_token_ids[start:end]
                    readings.append(DraftReading(request.row, start, np.array(token_ids, np.int64)))
        rests = not num_drafts and (self.rests or self._end(requests))
        return StepDrafts(num_drafts, readings, rests=rests)

    def _end(self, requests: Sequence[Request]) -> bool:
        """Whether the drafts of all these rows have ended, or end now."""
        if all(request.drafts_ended for request in requests):
            self.lengths.note_ended()
            return True
        if not self.lengths.ends(len(requests)):
            return False
        for request in requests:
            request.drafts_ended = True
        return True

    def planned(self, requests: Sequence[Request], num_drafts: int) -> None:
        """Note that a step drafts so many tokens for rows that are not behind."""
        for request in requests:
            is_behind = request.num_drafted is not None or request.drafts_ended
            request.num_ready = 0 if is_behind else num_drafts


class DraftCounts:
    """What was drafted and accepted, by the names of vLLM's metrics.

    accepted_at: how often the draft token at a position was accepted. steps: decode steps, by
    the largest number of draft tokens of a row. num_undrafted: rows of such steps whose parameters
    allow one token at a time. num_forced_tokens: accepted tokens that a grammar forced.
    """

    def __init__(self) -> None:
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.num_undrafted = self.num_forced_tokens = 0
        self.accepted_at: Counter[int] = Counter()
        self.steps: Counter[int] = Counter()

    def note(self, num_drafts: int, num_accepted: int) -> None:
        """Count a row's drafts in one step."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        self.accepted_at.update(range(num_accepted))
