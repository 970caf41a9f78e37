"""The times of decode steps at warm-up, and the times expected of later steps."""

from __future__ import annotations

from dataclasses import dataclass

# An upper bound on the host's work per step, which dominates for the smallest models.
HOST_MS = 2.0
# Attention reads the cache, the rest of a decode step the weights. Attention takes at most this
# many times longer per byte.
ATTENTION_FACTOR = 10.0


@dataclass(frozen=True)
class DecodePace:
    """Decode steps of padding, timed at warm-up.

    step_ms: (rows, milliseconds), ascending; empty if none were timed.
    token_share: the bytes of the cache of one token, relative to those of all weights.
    spread: how many times the experts of one token a step of many tokens may read; 1 without any.
    """

    step_ms: tuple[tuple[int, float], ...] = ()
    token_share: float = 0.0
    spread: float = 1.0

    def most_ms(self, num_rows: int, num_cached: int) -> float:
        """The most milliseconds that a decode step of `num_rows` rows should take, which have
        `num_cached` tokens in the cache in total."""
        (low, low_ms), (high, high_ms) = self.step_ms[0], self.step_ms[-1]
        share = min(1.0, (num_rows - low) / max(1, high - low))
        step_ms = low_ms + share * max(0.0, high_ms - low_ms)
        context = 1.0 + ATTENTION_FACTOR * num_cached * self.token_share
        return HOST_MS + step_ms * self.spread * context
