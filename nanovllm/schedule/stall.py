"""Bounds the time by which a prefill step delays the tokens of running requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Tokens. A chunk that does not fill its bucket has a multiple of this size: cache blocks end there.
GRAIN = 64


@dataclass(frozen=True)
class StallBound:
    """Step times of this device, measured at warm-up, and the bound on the time of a prefill step.

    max_ms: the bound on one step, in milliseconds.
    step_ms: (tokens, milliseconds) of a step of padding for each bucket, ascending: all work except
        attention.
    attention_ms: milliseconds for one query token and one key token, over all layers. The estimate
        ignores sliding windows.
    """

    max_ms: float
    step_ms: tuple[tuple[int, float], ...]
    attention_ms: float

    def estimate(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Milliseconds of a step with these chunks: (tokens, position of the first token)."""
        num_tokens = sum(num for num, _ in chunks)
        step_ms = next(
            (ms for tokens, ms in self.step_ms if tokens >= num_tokens), self.step_ms[-1][1]
        )
        return step_ms + self._attention(chunks)

    def next_chunk(
        self, before: Sequence[tuple[int, int]], num_tokens: int, start: int, max_ms: float
    ) -> int:
        """The size of the chunk, at most `num_tokens` from position `start` on, to add to a step
        with the chunks `before`.

        Returns the size with the least time per token among those within `max_ms`; 0 if the step is
        full. The first chunk of a step may exceed `max_ms`: it fills at least the smallest bucket,
        so every prompt makes progress.
        """
        num_before = sum(num for num, _ in before)
        # a decode step follows each prefill step: it takes about as long as the smallest bucket
        between_ms = self.step_ms[0][1]
        best, best_cost = 0, math.inf
        if num_before:
            best_cost = (self.estimate(before) - self._attention(before) + between_ms) / num_before
        for bucket, step_ms in self.step_ms:
            num = min(bucket - num_before, num_tokens)
            left_ms = max_ms - step_ms - self._attention(before)
            if num <= 0 or left_ms < 0:
                continue
            if self._attention([(num, start)]) > left_ms:
                # the positive root of attention_ms · (num · start + num² / 2) = left_ms
                root = math.sqrt(start * start + 2 * left_ms / self.attention_ms) - start
                num = min(num, int(root) // GRAIN * GRAIN)
            if num and (step_ms + between_ms) / (num_before + num) < best_cost:
                best, best_cost = num, (step_ms + between_ms) / (num_before + num)
        return best or (0 if num_before else min(num_tokens, self.step_ms[0][0]))

    def _attention(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self.attention_ms * sum(num * (start + num / 2) for num, start in chunks)
