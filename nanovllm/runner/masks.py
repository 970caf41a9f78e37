"""Masks of the tokens that constrained rows may choose, in a table that steps read.

A step with masks needs only the table, so it can be captured. The host writes the masks of a step's
constrained rows before the step. A row has P places for masks: those of the choices after each of
the tokens that it feeds.

S rows of the state | N tokens to choose | M masks | V vocabulary | W words of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.platforms.base import Platform

WORD_TOKENS = 32
ALL = -1  # a word that allows its 32 tokens


class MaskTable:
    """Owns the table. The first constrained request allocates it; it never moves."""

    def __init__(
        self, platform: Platform, num_rows: int, vocab_size: int, num_places: int = 1
    ) -> None:
        """`num_rows` is S, with the row of padding. `num_places` is P."""
        self._platform, self._num_places = platform, num_places
        self._shape = num_rows * num_places, -(-vocab_size // WORD_TOKENS)
        self._allowed_SW: Tensor | None = None
        self._masked: set[int] = set()  # rows whose masks may forbid something
        self._newest: tuple[list[int], Tensor] | None = None  # places written, also on the device

    @property
    def num_words(self) -> int:
        return self._shape[1]

    def reserve(self) -> None:
        """Allocate the table. Changes nothing if memory runs out."""
        if self._allowed_SW is None:
            device = self._platform.device
            self._allowed_SW = torch.full(self._shape, ALL, dtype=torch.int32, device=device)

    def write(
        self,
        rows: Sequence[int],
        masked: list[int],
        allowed_MW: np.ndarray,
        nums: Sequence[int] | None = None,
    ) -> None:
        """Set the masks for a step of these rows of the state; those not in `masked` allow all.
        `allowed_MW` has `nums` masks of each row (default: one)."""
        self.reserve()
        assert self._allowed_SW is not None
        upload, each = self._platform.upload, range(self._num_places)
        self._masked.update(masked)  # first: an interrupt must not leave an unrecorded mask
        stale = self._masked.intersection(rows).difference(masked)
        if stale:
            places = [row * self._num_places + place for row in sorted(stale) for place in each]
            self._allowed_SW.index_fill_(0, upload(places, torch.int64), ALL)
            self._masked -= stale
        counted = zip(masked, nums or [1] * len(masked), strict=True)
        written = [row * self._num_places + place for row, num in counted for place in range(num)]
        if self._newest is None or self._newest[0] != written:
            self._newest = written, upload(written, torch.int64)
        self._allowed_SW.index_copy_(0, self._newest[1], upload(allowed_MW, torch.int32))

    def apply_token_bitmask(
        self, row_idx_N: Tensor, logits_NV: Tensor, num_N: Tensor | None = None
    ) -> Tensor:
        """Logits with −inf for the tokens that the rows' masks forbid: the masks after their tokens
        number num_N, from 1 on; without num_N the first masks."""
        assert self._allowed_SW is not None, "masks have been written"
        place_N = row_idx_N
        if self._num_places > 1:
            place_N = row_idx_N * self._num_places
            if num_N is not None:  # rows without masks may feed more tokens
                place_N = place_N + (num_N - 1).clamp(0, self._num_places - 1)
        return ops.apply_token_bitmask(logits_NV, self._allowed_SW, place_N)

    def warm_up(self, logits_1V: Tensor) -> None:
        """Load the kernel, so that the first constrained request does not wait for it."""
        row_1 = torch.zeros(1, dtype=torch.int64, device=logits_1V.device)
        shape = 1, self._shape[1]
        allowed_1W = torch.full(shape, ALL, dtype=torch.int32, device=logits_1V.device)
        ops.apply_token_bitmask(logits_1V, allowed_1W, row_1)
