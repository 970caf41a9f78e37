"""How many draft tokens a step verifies: chosen from the times of steps and from what was accepted.

A step of K draft tokens makes 1 + a_1 + a_1·a_2 + … tokens a row, where a_i is the share of
accepted tokens at position i, of those whose earlier ones were accepted. It is worth its time if it
makes more tokens per millisecond than a plain step. Otherwise steps are plain, and of their time a
small share is spent on trials of short drafts, which show when they would be accepted again.
Between steps with drafts some are plain, which shows how long these take by now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A share of accepted tokens is a mean over about 1 / (1 − DECAY) rows.
DECAY = 0.99
# Before any result, as if so many rows had been seen at this share.
PRIOR_SHARE, PRIOR_ROWS = 0.8, 4.0
# Drafts must make so many times more tokens per millisecond than plain steps.
MARGIN = 1.01
# The share of the time of plain steps that trials of drafts may add to it.
TRIAL_SHARE = 0.01
PLAIN_EVERY = 64  # one step in so many is plain
# How much a step's measured time, and that of a trial, changes what is expected. A time that is off
# by more counts as MOST_OFF.
TIME_WEIGHT, TRIAL_WEIGHT, MOST_OFF = 0.05, 0.25, 4.0


@dataclass(frozen=True)
class StepTimes:
    """The times of decode steps at warm-up.

    rows: the row buckets, ascending. lengths: the numbers of draft tokens, ascending, 0 first.
    ms_RK: milliseconds of each bucket and each length.
    """

    rows: Sequence[int]
    lengths: Sequence[int]
    ms_RK: Sequence[Sequence[float]]

    def of_rows(self, num_rows: int) -> Sequence[float]:
        """The times of the bucket of so many rows, for each length."""
        fitting = (ms for rows, ms in zip(self.rows, self.ms_RK) if rows >= num_rows)
        return next(fitting, self.ms_RK[-1])


class DraftLengths:
    """Chooses the number of draft tokens of each decode step."""

    def __init__(self, times: StepTimes, trial_steps: int = 1) -> None:
        """A trial takes `trial_steps` steps: the proposer may have to draft before it."""
        self._times, self._trial_steps = times, trial_steps
        self._num_tried = [0.0] * times.lengths[-1]
        self._num_accepted = [0.0] * times.lengths[-1]
        self._factors = [1.0] * len(times.lengths)  # of measured times, by length
        self._chosen = 0  # the length that is best by now
        self._trial_ms = 0.0  # saved up for the next trial of drafts
        self._trial_left = 0  # steps of the trial
        self._num_steps = 0  # since the last plain step

    def choose(
        self, num_rows: int, num_taking: int | None = None, forced: Sequence[int] = ()
    ) -> int:
        """The number of draft tokens of the next step of so many rows; 0: a plain step. Only
        `num_taking` of the rows (default: all) would have them. Others have so many that are
        `forced`, which count as right."""
        share = 1.0 if num_taking is None else num_taking / num_rows
        lengths = self._times.lengths
        made_K = [1 + share * (made - 1) for made in self._tokens()]
        for idx, length in enumerate(lengths):
            made_K[idx] += sum(min(length, num) for num in forced) / num_rows
        ms_K = self._expected_ms(num_rows)
        best = max(range(1, len(lengths)), key=lambda idx: made_K[idx] / ms_K[idx])
        plain_ms, trial_ms = ms_K[0], max(0.0, ms_K[1] - ms_K[0])
        if made_K[best] / ms_K[best] > MARGIN / plain_ms:
            self._chosen = lengths[best]
            self._num_steps = (self._num_steps + 1) % PLAIN_EVERY
            return lengths[best] if self._num_steps else 0
        self._chosen = 0
        if not self._trial_left and self._trial_ms >= self._trial_steps * trial_ms:
            self._trial_ms, self._trial_left = 0.0, self._trial_steps
        if self._trial_left:
            self._trial_left -= 1
            return lengths[1]
        self._trial_ms += TRIAL_SHARE * plain_ms
        return 0

    def note_accepted(self, num_drafts: int, num_accepted: int) -> None:
        """Record how many of a row's draft tokens a step has accepted."""
        for place in range(min(num_accepted + 1, num_drafts, len(self._num_tried))):
            self._num_tried[place] = DECAY * self._num_tried[place] + 1.0
            is_accepted = place < num_accepted
            self._num_accepted[place] = DECAY * self._num_accepted[place] + is_accepted

    def note_ms(self, num_rows: int, num_drafts: int, ms: float) -> None:
        """Record the time of a step, so that contexts and the host's work count. It changes what is
        expected of all lengths, since these change alike; that of a trial what is expected of steps
        with drafts, or of plain ones."""
        idx = next(i for i, length in enumerate(self._times.lengths) if length >= num_drafts)
        off = ms / self._expected_ms(num_rows)[idx]
        off = min(max(off, 1 / MOST_OFF), MOST_OFF)
        if num_drafts == self._chosen:
            change = 1.0 + TIME_WEIGHT * (off - 1.0)
            self._factors = [change * factor for factor in self._factors]
        else:
            change = 1.0 + TRIAL_WEIGHT * (off - 1.0)
            for other in range(1, len(self._factors)) if idx else (0,):
                self._factors[other] *= change

    def _expected_ms(self, num_rows: int) -> list[float]:
        of_rows = self._times.of_rows(num_rows)
        return [ms * factor for ms, factor in zip(of_rows, self._factors)]

    def _tokens(self) -> list[float]:
        """The expected tokens that a row makes in a step of each length. A position of which little
        is known is like the one before it."""
        share, reached, made, made_K = PRIOR_SHARE, 1.0, 1.0, []
        for place in range(self._times.lengths[-1]):
            if place in self._times.lengths:
                made_K.append(made)
            tried, accepted = self._num_tried[place], self._num_accepted[place]
            share = (accepted + PRIOR_ROWS * share) / (tried + PRIOR_ROWS)
            reached *= share
            made += reached
        return [*made_K, made]
