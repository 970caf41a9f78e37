"""Earlier answers in a buffer on the device, in which a proposer looks for the newest tokens.

The host decides where each answer is. The oldest are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanovllm.schedule.plan import PastTokens

END = -1  # after each answer


class PastAnswers:
    """The places of answers in a buffer of `size` tokens."""

    def __init__(self, size: int) -> None:
        self._size, self._next = size, 0
        self._waiting: list[PastTokens] = []

    def add(self, token_ids: Sequence[int]) -> None:
        """Keep the end of an answer, as much as the buffer has room for."""
        kept = [*token_ids[-(self._size - 1) :], END]
        if len(kept) < 2:
            return
        if self._next + len(kept) > self._size:  # what is left of the last lap has no end
            rest = np.full(self._size - self._next, END, np.int32)
            self._waiting.append(PastTokens(self._next, rest))
            self._next = 0
        self._waiting.append(PastTokens(self._next, np.array(kept, np.int32)))
        self._next += len(kept)

    def take(self) -> list[PastTokens]:
        """What the next step writes to the buffer."""
        taken, self._waiting = self._waiting, []
        return taken
