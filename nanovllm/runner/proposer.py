"""Proposers on the device: they draft the tokens that follow a step's, within the same step.

The draft tokens are in the state when the next step begins, so the host plans the step that
verifies them without knowing them. Any token may be fed as a draft: the model's own choice decides.

R rows | T tokens | K draft tokens a row | D hidden | S rows of the state
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from nanovllm.models.model import Batch
from nanovllm.runner.state import DeviceState


class Fed(NamedTuple):
    """What a step has fed to the model, and what the model made of it.

    phase, max_q_len: those of the step's layers. batch: the places of the tokens in the cache.
    states_TJ: hidden states [D] after each of `DeviceProposer.layers`, beside each other; None
    without layers. A proposer that reads nothing of this but the rows (`Drafting.reads_fed`) gets
    only these.
    """

    phase: str
    max_q_len: int
    row_idx_R: Tensor
    token_T: Tensor
    batch: Batch
    states_TJ: Tensor | None = None


def rows_alone(row_idx_R: Tensor) -> Fed:
    """What a step has fed, for a proposer that reads only its rows."""
    nothing: Any = None
    return Fed("", 0, row_idx_R, nothing, nothing)


class DeviceProposer(Protocol):
    """Drafts K = `num` tokens after each row's newest one.

    `layers` are those of the model whose hidden states it reads. It is a frozen dataclass of
    numbers: its text is in the note that a store is full.
    """

    @property
    def num(self) -> int: ...
    @property
    def layers(self) -> tuple[int, ...]: ...

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> Tensor | None:
        """token_RK, after a step that has written the newest tokens and positions to the state.
        NO_TOKEN stands for none. None: it has written them to the state itself,
        or has drafted none.

        It launches ops, or programs of `steps`: the `Steps` of its model, None without one. It may
        be captured, so it reads device tensors alone.
        """
        ...


class Drafting(NamedTuple):
    """A proposer, the `Steps` of its model if it has one, and memory for hidden states of up to T
    tokens after L layers.

    reads_last: whether it reads those after the last layer, of all tokens. reads_fed: whether it
    reads more than the rows of steps. varies: whether it drafts as many tokens as a verifying step
    has room for, and none after other steps.
    """

    proposer: DeviceProposer
    steps: Any
    states_TLD: Tensor | None
    reads_last: bool
    reads_fed: bool = True
    varies: bool = False

    def after(self, max_q_len: int | None) -> DeviceProposer:
        """The proposer after a step with so many tokens a row; None for a prompt's."""
        if not self.varies:
            return self.proposer
        num = 0 if max_q_len is None else max_q_len - 1
        made: Any = replace(cast(Any, self.proposer), num=num)
        return cast(DeviceProposer, made)

    def states(self, num_tokens: int) -> Tensor | None:
        """The hidden states [T, L · D] of a step's tokens."""
        if self.states_TLD is None:
            return None
        return self.states_TLD.narrow(0, 0, num_tokens).flatten(1)

    @property
    def kept(self) -> dict[int, Tensor] | None:
        """Where the hidden states [T, D] after each layer are kept; None if one is read twice."""
        if self.states_TLD is None:
            return {}
        layers = self.proposer.layers
        found = {layer: self.states_TLD.select(1, place) for place, layer in enumerate(layers)}
        return found if len(found) == len(layers) else None

    def keep(self, layer_idx: int, h_TD: Tensor) -> None:
        """Keep the hidden states after a layer, if the proposer reads them."""
        if self.states_TLD is None:
            return
        for place, wanted in enumerate(self.proposer.layers):
            if wanted == layer_idx:
                kept_TD = self.states_TLD.select(1, place).narrow(0, 0, len(h_TD))
                # unlike the method, this takes fake tensors of an absent device
                torch.ops.aten.copy_.default(kept_TD, h_TD)


def write(state: DeviceState, row_idx_R: Tensor, token_RK: Tensor | None) -> None:
    """Write draft tokens to the state, unless the proposer has."""
    if token_RK is None:
        return
    assert state.draft_SK is not None
    # any token is right to feed, but it must be one
    draft_SK = state.draft_SK.narrow(1, 0, token_RK.shape[1])
    draft_SK.index_copy_(0, row_idx_R, token_RK.clamp(min=0))
