"""A launched step, and its result once the host waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from nanovllm.platforms.base import HostCopy
from nanovllm.runner.sampling import LogprobCopies
from nanovllm.schedule.plan import Logprobs, StepPlan, StepResult


@dataclass(frozen=True)
class AsyncOutput:
    """A launched step."""

    plan: StepPlan
    tokens: HostCopy  # [bucket's rows], or [rows, K] with counts
    counts: HostCopy | None
    logprobs: LogprobCopies | None  # of each row's token, with counts of each fed one's successor
    prompt_logprobs: list[list[LogprobCopies]]  # by entry of the plan, in parts
    drafts: HostCopy | None = None  # [rows with masks, K]
    check: Callable[[], None] = lambda: None  # raises if the result is not one

    def wait(self) -> StepResult:
        """Block until the step is done; return its StepResult."""
        found = self.tokens.tolist()
        self.check()
        first: Sequence[int]  # the place of each row's first token among all fed ones
        if self.counts is None:
            tokens = [[one] if wanted else [] for one, wanted in zip(found, self.plan.is_sampled)]
            first = range(len(tokens))
        else:
            counts = self.counts.tolist()[: len(self.plan.rows)]
            tokens = [row[:count] for row, count in zip(found, counts)]
            first = list(accumulate(self.plan.num_tokens, initial=0))
        logprobs = None
        if self.logprobs is not None:
            places = [place + i for place, row in zip(first, tokens) for i in range(len(row))]
            logprobs = Logprobs(*(values[places] for values in self.logprobs.wait()))
        parts = [_joined([part.wait() for part in parts]) for parts in self.prompt_logprobs]
        drafts = [] if self.drafts is None else self.drafts.tolist()
        return StepResult(tokens, logprobs, parts, drafts)


def _joined(parts: Sequence[Logprobs]) -> Logprobs:
    return Logprobs(*(np.concatenate(values) for values in zip(*parts)))
