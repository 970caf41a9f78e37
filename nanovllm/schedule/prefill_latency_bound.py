"""Bounds the time by which a prefill step delays the tokens of running requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Tokens. A chunk that does not fill its bucket has a multiple of this size: cache blocks end there.
GRAIN = 64
# Without `max_stall_ms` a prefill step takes at most this many times the shortest step. A decode
# step follows each prefill step. With few rows it takes about as long as the shortest step, and
# yields few tokens. So such steps take about a tenth of the time, whatever the size of the model.
SHORTEST_STEPS = 12


@dataclass(frozen=True)
class PrefillLatencyBound:
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

    def in_proportion(self) -> PrefillLatencyBound:
        """The same with the default bound: `SHORTEST_STEPS` shortest steps, at most `max_ms`."""
        return replace(self, max_ms=min(self.max_ms, SHORTEST_STEPS * self.step_ms[0][1]))

    def next_chunk(
        self,
        before: Sequence[tuple[int, int]],
        chunk: tuple[int, int],
        max_ms: float,
        num_left: int = 0,
    ) -> int:
        """The size of the part of `chunk` to add to a step with the chunks `before`.

        `num_left` tokens of other prompts wait to follow in the same step. So a prompt that is
        shorter than a bucket does not keep the step to the small bucket that it fills.

        Returns the size with the least time per token among those within `max_ms`; 0 if the step is
        full. The first chunk of a step may exceed `max_ms`: it fills at least the smallest bucket,
        so every prompt makes progress.
        """
        num_tokens, start = chunk
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
            total = min(bucket, num_before + num_tokens + num_left)
            if self._attention([(num, start)]) > left_ms:
                # the positive root of attention_ms · (num · start + num² / 2) = left_ms
                root = math.sqrt(start * start + 2 * left_ms / self.attention_ms) - start
                num = min(num, int(root) // GRAIN * GRAIN)
                total = num_before + num
            if num and (step_ms + between_ms) / total < best_cost:
                best, best_cost = num, (step_ms + between_ms) / total
        return best or (0 if num_before else min(num_tokens, self.step_ms[0][0]))

    def _attention(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self.attention_ms * sum(num * (start + num / 2) for num, start in chunks)
