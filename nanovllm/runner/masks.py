"""Masks of the tokens that constrained rows may choose, in a table that steps read.

A step with masks needs only the table, so it can be captured. The host writes the masks of a step's
constrained rows before the step.

S rows of the state | R rows of a step | M masked rows | V vocabulary | W words of 32 tokens.
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

    def __init__(self, platform: Platform, num_rows: int, vocab_size: int) -> None:
        """`num_rows` is S, with the row of padding."""
        self._platform = platform
        self._shape = num_rows, -(-vocab_size // WORD_TOKENS)
        self._allowed_SW: Tensor | None = None
        self._masked: set[int] = set()  # rows whose masks may forbid something
        self._newest: tuple[list[int], Tensor] | None = None  # masked rows, also on the device

    @property
    def num_words(self) -> int:
        return self._shape[1]

    def reserve(self) -> None:
        """Allocate the table. Changes nothing if memory runs out."""
        if self._allowed_SW is None:
            device = self._platform.device
            self._allowed_SW = torch.full(self._shape, ALL, dtype=torch.int32, device=device)

    def write(self, rows: Sequence[int], masked: list[int], allowed_MW: np.ndarray) -> None:
        """Set the masks for a step of these rows of the state; those not in `masked` allow all."""
        self.reserve()
        assert self._allowed_SW is not None
        upload = self._platform.upload
        self._masked.update(masked)  # first: an interrupt must not leave an unrecorded mask
        stale = self._masked.intersection(rows).difference(masked)
        if stale:
            self._allowed_SW.index_fill_(0, upload(sorted(stale), torch.int64), ALL)
            self._masked -= stale
        if self._newest is None or self._newest[0] != masked:
            self._newest = list(masked), upload(list(masked), torch.int64)
        self._allowed_SW.index_copy_(0, self._newest[1], upload(allowed_MW, torch.int32))

    def apply_token_bitmask(self, row_idx_R: Tensor, logits_RV: Tensor) -> Tensor:
        """Logits with −inf for the tokens that the rows' masks forbid."""
        assert self._allowed_SW is not None, "masks have been written"
        return ops.apply_token_bitmask(logits_RV, self._allowed_SW, row_idx_R)

    def warm_up(self, logits_1V: Tensor) -> None:
        """Load the kernel, so that the first constrained request does not wait for it."""
        row_1 = torch.zeros(1, dtype=torch.int64, device=logits_1V.device)
        shape = 1, self._shape[1]
        allowed_1W = torch.full(shape, ALL, dtype=torch.int32, device=logits_1V.device)
        ops.apply_token_bitmask(logits_1V, allowed_1W, row_1)
