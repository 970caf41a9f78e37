"""How long a prefill step may keep those waiting who watch their tokens come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

GRAIN = 64  # tokens; a chunk that does not fill its bucket ends at a multiple, where cache blocks end, too


@dataclass(frozen=True)
class StallBound:
    """What a prefill step takes on this device, as measured at warm-up, and the most that it may take.

    max_ms: the bound on one step, in milliseconds.
    step_ms: (tokens, milliseconds) of a step of padding, for each bucket, ascending: everything but attention.
    attention_ms: one token attending to one token, in all layers. Sliding windows are not counted on.
    """

    max_ms: float
    step_ms: tuple[tuple[int, float], ...]
    attention_ms: float

    def estimate(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Milliseconds of a step with chunks of (tokens, position of the first)."""
        num_tokens = sum(num for num, _ in chunks)
        step_ms = next(
            (ms for tokens, ms in self.step_ms if tokens >= num_tokens), self.step_ms[-1][1]
        )
        return step_ms + self._attention(chunks)

    def next_chunk(
        self, before: Sequence[tuple[int, int]], num_tokens: int, start: int, max_ms: float
    ) -> int:
        """How many of `num_tokens` tokens from position `start` on shall join a step of the chunks `before`.

        Of the sizes that stay within `max_ms` the one that spends the least time per token. 0: the step is full. The
        first chunk of a step is never empty, whatever it takes: the smallest bucket at least, so that every prompt ends.
        """
        num_before = sum(num for num, _ in before)
        between_ms = self.step_ms[0][
            1
        ]  # a decode step goes between two, and takes about what the smallest one does
        best, best_cost = 0, math.inf
        if num_before:
            best_cost = (self.estimate(before) - self._attention(before) + between_ms) / num_before
        for bucket, step_ms in self.step_ms:
            num = min(bucket - num_before, num_tokens)
            left_ms = max_ms - step_ms - self._attention(before)
            if num <= 0 or left_ms < 0:
                continue
            if self._attention([(num, start)]) > left_ms:
                # the root of attention_ms · (num · start + num² / 2) = left_ms
                root = math.sqrt(start * start + 2 * left_ms / self.attention_ms) - start
                num = min(num, int(root) // GRAIN * GRAIN)
            if num and (step_ms + between_ms) / (num_before + num) < best_cost:
                best, best_cost = num, (step_ms + between_ms) / (num_before + num)
        return best or (0 if num_before else min(num_tokens, self.step_ms[0][0]))

    def _attention(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self.attention_ms * sum(num * (start + num / 2) for num, start in chunks)
