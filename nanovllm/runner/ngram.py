"""Prompt lookup: drafts are the tokens that followed the newest ones when they occurred before, in
the same row or, with a past, in earlier answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.runner.proposer import Fed
from nanovllm.runner.state import DeviceState


@dataclass(frozen=True)
class Ngram:
    """The proposer that looks for the last tokens of a row in those before them (see
    `ops.ngram_propose`). It launches one kernel a step."""

    num: int
    shortest: int
    longest: int
    layers: tuple[int, ...] = field(default=(), init=False)

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> None:
        """See `DeviceProposer`. It writes the drafts itself."""
        op, arguments = self.call(state, fed.row_idx_R)
        op(*arguments)

    def call(self, state: DeviceState, row_idx_R: Tensor) -> tuple[Any, list[Any]]:
        """The op that drafts, and its arguments."""
        rows = [state.token_S, state.pos_S, row_idx_R]
        lengths = [self.shortest, self.longest]
        written = [state.history_SM, state.draft_SK]
        return ops.ngram_propose, [*written, *rows, *lengths, state.past_C]
