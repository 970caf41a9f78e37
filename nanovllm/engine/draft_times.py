"""Measures decode steps while an engine works, for the choice of draft lengths."""

from __future__ import annotations

import time
from collections import deque

from nanovllm.schedule.draft_length import DraftLengths
from nanovllm.schedule.plan import StepPlan, StepResult


class DraftTimes:
    """The time of a step is that from its launch, or from the result before it, to its result."""

    def __init__(self, lengths: DraftLengths) -> None:
        self._lengths = lengths
        self._started: deque[float] = deque()
        self._last = 0.0

    def launching(self) -> None:
        """Call it before a step's masks are computed and it is launched."""
        self._started.append(time.perf_counter())

    def collected(self, plan: StepPlan, result: StepResult) -> None:
        """Call it when a step's result is known."""
        now = time.perf_counter()
        begun, self._last = max(self._started.popleft(), self._last), now
        if plan.is_prefill or not plan.sampling.is_timed:
            return
        self._lengths.note_step(
            len(plan.rows),
            max(plan.tokens_per_row - 1, plan.drafts.room),
            1e3 * (now - begun),
            sum(map(len, result.tokens)),
            has_masks=bool(plan.sampling.masked),
            reads=bool(plan.drafts.readings),
            rests=plan.drafts.rests,
        )

    def clear(self) -> None:
        """After an error: no step is in flight."""
        self._started.clear()
