"""Copies of the states that recurrent layers keep of rows, for later requests with equal prefixes.

X places of rows (`models.model.States`) | Y slots of snapshots | N copies of a step
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.platforms.base import Platform
from nanovllm.schedule.plan import RowCopy


class RowStates(NamedTuple):
    """A tensor that a layer keeps of each row: [X, …], and its snapshots [Y, …]."""

    of_rows: Tensor
    of_slots: Tensor


@dataclass(frozen=True)
class Snapshots:
    """The states of all recurrent layers. Rows have `num_places` places each."""

    states: tuple[RowStates, ...]
    num_places: int

    def restore(self, copies: Sequence[RowCopy], platform: Platform) -> None:
        """Give rows the states of slots, before a step."""
        place_N, slot_N = self._indices(copies, platform)
        for of_rows, of_slots in self.states:
            of_rows.index_copy_(0, place_N, of_slots.index_select(0, slot_N))

    def save(self, copies: Sequence[RowCopy], platform: Platform) -> None:
        """Copy the states of rows to slots, after a step."""
        place_N, slot_N = self._indices(copies, platform)
        for of_rows, of_slots in self.states:
            of_slots.index_copy_(0, slot_N, of_rows.index_select(0, place_N))

    @contextmanager
    def restoring(self, row_R: Tensor) -> Iterator[None]:
        """Restore the states of rows after the steps in the block."""
        if not self.states:
            yield
            return
        every_K = torch.arange(self.num_places, device=row_R.device)
        place_X = (row_R.unsqueeze(1) * self.num_places + every_K).flatten().unique()
        before = [of_rows.index_select(0, place_X) for of_rows, _ in self.states]
        yield
        for (of_rows, _), values in zip(self.states, before):
            of_rows.index_copy_(0, place_X, values)

    def _indices(self, copies: Sequence[RowCopy], platform: Platform) -> tuple[Tensor, Tensor]:
        pairs = [
            (row * self.num_places + (pos - 1) % self.num_places, slot) for row, pos, slot in copies
        ]
        place_N, slot_N = platform.upload(pairs, torch.int64).unbind(1)
        return place_N, slot_N
