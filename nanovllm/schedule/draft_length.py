"""How many draft tokens a step verifies: chosen from the times of steps and from what was accepted.

A step of K draft tokens makes 1 + a_1 + a_1·a_2 + … tokens a row, where a_i is the share of
accepted tokens at position i, of those whose earlier ones were accepted. It is worth its time if it
makes more tokens per millisecond than a plain step; long drafts only once shorter ones have been
seen. Otherwise steps are plain, and now and then a trial of short drafts shows whether they would
be accepted again. Between steps with drafts some are plain, which shows how long these take by now.

Expectations can be wrong, so an account has the time that drafts have saved: what as many tokens
would have taken in plain steps, less what the steps took. Drafts that have lost more than they
saved stop, however good they look, until a small share of the time of all steps has paid for it and
for a trial: less would end with the first step, which may have no drafts yet.

A proposer that reads on in plain steps makes these longer. That is lost as well, so where it takes
more than that share, plain steps run without the proposer once nothing is left for a trial.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

# A share of accepted tokens is a mean over about 1 / (1 − DECAY) rows.
DECAY = 0.99
# Before any result, as if so many rows had been seen at this share.
PRIOR_SHARE, PRIOR_ROWS = 0.8, 4.0
# A longer draft is chosen once so many rows have reached the last position of the next shorter one.
SEEN_ROWS = 4.0
# Drafts must make so many times more tokens per millisecond than plain steps.
MARGIN = 1.01
# The share of the time of all steps that drafts may lose.
LOST_SHARE = 0.008
# Plain steps whose time drafts may lose at first, and at most after they have saved more.
FIRST_STEPS, MOST_STEPS = 2.0, 32.0
TRIAL_EVERY = 8  # plain steps between trials at least
PLAIN_EVERY = 64  # one step in so many is plain; at first, in each bucket, more are
# How much a step's measured time, and that of a trial, changes what is expected. A time that is off
# by more counts as MOST_OFF.
TIME_WEIGHT, TRIAL_WEIGHT, MOST_OFF = 0.05, 0.25, 2.0


@dataclass(frozen=True)
class StepTimes:
    """The times of decode steps at warm-up.

    rows: the row buckets, ascending. lengths: the numbers of draft tokens, ascending, 0 first.
    ms_RK: milliseconds of each bucket and each length; plain steps without a proposer that may
    stop reading. reading_R: how many times as long plain steps take in which it reads on.
    """

    rows: Sequence[int]
    lengths: Sequence[int]
    ms_RK: Sequence[Sequence[float]]
    reading_R: Sequence[float] = ()

    def bucket(self, num_rows: int) -> int:
        """The number of the smallest bucket for so many rows."""
        return min(bisect_left(self.rows, num_rows), len(self.rows) - 1)


class DraftLengths:
    """Chooses the number of draft tokens of each decode step."""

    def __init__(self, times: StepTimes, trial_steps: int = 1) -> None:
        """A trial takes `trial_steps` steps: the proposer may have to draft before it."""
        self._lengths, self._trial_steps, self._times = times.lengths, trial_steps, times
        self._num_tried = [0.0] * times.lengths[-1]
        self._num_accepted = [0.0] * times.lengths[-1]
        # of steps without and with masks, which the host computes before them
        reading_R = times.reading_R or [1.0] * len(times.rows)
        self._buckets = [
            [_Bucket(*one, trial_steps) for one in zip(times.ms_RK, reading_R, strict=True)]
            for _ in range(2)
        ]
        self._chosen = 0  # the length that is best by now
        self._saved_ms = FIRST_STEPS * times.ms_RK[0][0]
        self._owes = False  # drafts have lost more than they saved, until a trial is paid for
        self._trial_left = 0  # steps of the trial
        self._num_plain = 0  # steps since the last one

    def choose(
        self,
        num_rows: int,
        num_taking: int | None = None,
        forced: Sequence[int] = (),
        has_masks: bool = False,
    ) -> int:
        """The number of draft tokens of the next step of so many rows; 0: a plain step. Only
        `num_taking` of the rows (default: all) would have them. Others have so many that are
        `forced`, which count as right."""
        share = 1.0 if num_taking is None else num_taking / num_rows
        bucket = self._buckets[has_masks][self._times.bucket(num_rows)]
        ms_K, lengths = bucket.ms_K, self._lengths
        trial_ms = self._trial_ms(bucket)
        if self._saved_ms < 0.0 or self._saved_ms >= trial_ms:
            self._owes = self._saved_ms < 0.0
        if self._owes:
            share = 0.0  # drafts must not decide
        made_K, num = self._made(share, forced, num_rows)
        best = max(range(1, num), key=lambda idx: made_K[idx] / ms_K[idx])
        if made_K[best] / ms_K[best] > MARGIN / ms_K[0]:
            self._chosen = lengths[best]
            return 0 if bucket.plain_is_due() else lengths[best]
        self._chosen = 0
        if self._num_plain >= TRIAL_EVERY and self._saved_ms >= trial_ms:
            self._num_plain, self._trial_left = 0, self._trial_steps
        self._saved_ms = min(self._saved_ms, trial_ms)
        if self._trial_left:
            self._trial_left -= 1
            return lengths[1]
        self._num_plain += 1
        return 0

    def note_ended(self) -> None:
        """Record a plain step of rows whose drafts have ended, for which nothing is chosen."""
        self._num_plain += 1

    def ends(self, num_rows: int) -> bool:
        """Whether the plain step that was just chosen is to be without the proposer, whose drafts
        of these rows then end: they do not pay, nothing is left for a trial, and to read on would
        lose more than drafts may."""
        bucket = self._buckets[False][self._times.bucket(num_rows)]
        loses = bucket.reading > 1.0 + LOST_SHARE
        return loses and self._chosen == 0 and self._saved_ms < self._trial_ms(bucket)

    def note_accepted(self, num_drafts: int, num_accepted: int) -> None:
        """Record how many of a row's draft tokens a step has accepted."""
        for place in range(min(num_accepted + 1, num_drafts, len(self._num_tried))):
            self._num_tried[place] = DECAY * self._num_tried[place] + 1.0
            is_accepted = place < num_accepted
            self._num_accepted[place] = DECAY * self._num_accepted[place] + is_accepted

    def note_step(
        self,
        num_rows: int,
        num_drafts: int,
        ms: float,
        num_tokens: int,
        *,
        has_masks: bool = False,
        reads: bool = False,
        rests: bool = False,
    ) -> None:
        """Record the time of a step and how many tokens all its rows have made. Of one before which
        a second model `reads` tokens it tells nothing of others. rests: the proposer did not run.
        """
        bucket = self._buckets[has_masks][self._times.bucket(num_rows)]
        reading = 1.0 if num_drafts or rests else bucket.reading
        if not reads:
            idx = bisect_left(self._lengths, num_drafts)
            ms = bucket.note(idx, ms / reading, is_usual=num_drafts == self._chosen)
        plain_ms = bucket.ms_K[0]
        self._saved_ms -= (reading - 1.0) * ms
        self._saved_ms += LOST_SHARE * plain_ms
        if num_drafts:
            self._saved_ms += plain_ms * num_tokens / num_rows - ms
        self._saved_ms = min(self._saved_ms, MOST_STEPS * plain_ms)

    def _made(self, share: float, forced: Sequence[int], num_rows: int) -> tuple[list[float], int]:
        """The expected tokens that a row makes in a step of each length, and how many of the
        lengths may be chosen. Those after the seen ones are for forced tokens alone: nothing is
        expected of further tokens of other rows."""
        lengths, seen = self._lengths, self._num_seen()
        tokens = self._tokens()
        made_K = [1 + share * (tokens[min(idx, seen - 1)] - 1) for idx in range(len(lengths))]
        for idx, length in enumerate(lengths):
            made_K[idx] += sum(min(length, num) for num in forced) / num_rows
        shorter = sum(length < max(forced, default=0) for length in lengths)
        return made_K, max(seen, min(shorter + 1, len(lengths)))

    def _num_seen(self) -> int:
        """How many of the lengths may be chosen: the first two, and those after lengths that were
        seen."""
        num = 2
        while num < len(self._lengths) and self._num_tried[self._lengths[num - 1] - 1] >= SEEN_ROWS:
            num += 1
        return num

    def _trial_ms(self, bucket: _Bucket) -> float:
        return self._trial_steps * max(0.0, bucket.ms_K[1] - bucket.ms_K[0])

    def _tokens(self) -> list[float]:
        """The expected tokens that a row makes in a step of each length. A position of which little
        is known is like the one before it."""
        share, reached, made, made_K = PRIOR_SHARE, 1.0, 1.0, []
        for place in range(self._lengths[-1]):
            if place in self._lengths:
                made_K.append(made)
            tried, accepted = self._num_tried[place], self._num_accepted[place]
            share = (accepted + PRIOR_ROWS * share) / (tried + PRIOR_ROWS)
            reached *= share
            made += reached
        return [*made_K, made]


class _Bucket:
    """What is expected of the steps of one bucket: their times for each length. reading: how many
    times as long a plain step takes in which the proposer reads on. plain_every: steps with drafts
    before the first plain one among them."""

    def __init__(self, ms_K: Sequence[float], reading: float, plain_every: int) -> None:
        self.ms_K, self.reading = list(ms_K), reading
        self._newest_K = list(ms_K)  # measured, at first at warm-up
        self._num_K = [0] * len(ms_K)  # so many times
        self._num_steps = 0  # with drafts since the last plain one
        self._plain_every = plain_every

    def plain_is_due(self) -> bool:
        """Whether the next step is plain, among steps with drafts."""
        self._num_steps += 1
        if self._num_steps <= self._plain_every:
            return False
        self._num_steps, self._plain_every = 0, min(2 * self._plain_every, PLAIN_EVERY)
        return True

    def note(self, idx: int, ms: float, *, is_usual: bool) -> float:
        """Change what is expected by a measured step, so that contexts and the host's work count.
        A usual one changes the times of all lengths, since these change alike; that of a trial
        those of steps with drafts, or of plain ones. Returns the time, or that of the step of this
        length before it if it is less: then something else may have held this one up."""
        ms, self._newest_K[idx] = min(ms, self._newest_K[idx]), ms
        self._num_K[idx] += 1
        weight = max(TIME_WEIGHT if is_usual else TRIAL_WEIGHT, 1 / (1 + self._num_K[idx]))
        off = min(max(ms / self.ms_K[idx], 1 / MOST_OFF), MOST_OFF)
        change = 1.0 + weight * (off - 1.0)
        changed = range(len(self.ms_K)) if is_usual else range(1, len(self.ms_K)) if idx else (0,)
        for other in changed:
            self.ms_K[other] *= change
        return ms
