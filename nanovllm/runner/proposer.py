"""Proposers on the device: they draft the tokens that follow a step's, within the same step.

The draft tokens are in the state when the next step begins, so the host plans the step that
verifies them without knowing them. Any token may be fed as a draft: the model's own choice decides.

R rows | T tokens | K draft tokens a row | D hidden | S rows of the state
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from nanovllm.models.model import Batch
from nanovllm.runner.state import DeviceState


class Fed(NamedTuple):
    """What a step has fed to the model, and what the model made of it.

    phase, max_q_len: those of the step's layers. batch: the places of the tokens in the cache.
    hidden: [T, D] after each of `DeviceProposer.layers`.
    """

    phase: str
    max_q_len: int
    row_idx_R: Tensor
    token_T: Tensor
    batch: Batch
    hidden: tuple[Tensor, ...] = ()


class DeviceProposer(Protocol):
    """Drafts K = `num` tokens after each row's newest one.

    `layers` are those of the model whose hidden states it reads. It is a frozen dataclass of
    numbers: its text is in the note that a store is full.
    """

    @property
    def num(self) -> int: ...
    @property
    def layers(self) -> tuple[int, ...]: ...

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> Tensor:
        """token_RK, after a step that has written the newest tokens and positions to the state.
        NO_TOKEN stands for none.

        It launches ops, or programs of `steps`: the `Steps` of its model, None without one. It may
        be captured, so it reads device tensors alone.
        """
        ...


class Drafting(NamedTuple):
    """A proposer, the `Steps` of its model if it has one, and memory for hidden states of up to T
    tokens: [num layers, T, D].

    reads_last: whether it reads those after the last layer, of all tokens.
    """

    proposer: DeviceProposer
    steps: Any
    hidden_LTD: Tensor | None
    reads_last: bool

    def hidden(self, num_tokens: int) -> tuple[Tensor, ...]:
        if self.hidden_LTD is None:
            return ()
        return self.hidden_LTD.narrow(1, 0, num_tokens).unbind(0)

    def keep(self, layer_idx: int, h_TD: Tensor) -> None:
        """Keep the hidden states after a layer, if the proposer reads them."""
        if self.hidden_LTD is None:
            return
        for place, wanted in enumerate(self.proposer.layers):
            if wanted == layer_idx:
                self.hidden_LTD.select(0, place).narrow(0, 0, len(h_TD)).copy_(h_TD)


def write(state: DeviceState, row_idx_R: Tensor, token_RK: Tensor) -> None:
    """Write draft tokens to the state."""
    assert state.draft_SK is not None
    # any token is right to feed, but it must be one
    state.draft_SK.index_copy_(0, row_idx_R, token_RK.clamp(min=0))
