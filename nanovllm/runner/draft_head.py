"""The proposer that runs a head: a small model over the hidden states of the model's own steps.

R rows | T tokens | K draft tokens a row | D hidden of the head | J inputs of its first layer
V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.draft_head import HeadModel, Outer
from nanovllm.models.model import Batch, Params
from nanovllm.runner.proposer import Fed
from nanovllm.runner.state import DeviceState, Draw, choose_and_advance

if TYPE_CHECKING:
    from nanovllm.runner.steps import Steps


def following(
    state: DeviceState, token_T: Tensor, batch: Batch, row_idx_R: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.next_tokens` after a step that has fed token_T.

    At the end of a prompt's part that is not the last, the newest token is the one that the model
    would choose, not the prompt's next.
    """
    rows = state.token_S, state.pos_S, row_idx_R
    next_T, last_R = ops.next_tokens(*rows, token_T, batch.seq_len_R, batch.q_start_S)
    return next_T, last_R


def draw_of(target_X: Tensor, vocab_size: int) -> Draw:
    """`ops.sample` from logits of these tokens."""

    def draw(logits_RX: Tensor, *inputs: Tensor) -> Tensor:
        token_R: Tensor = ops.sample_of(logits_RX, target_X, vocab_size, *inputs)
        return token_R

    return draw


def begin_again(
    again: Callable[..., Tensor],
    sizes: tuple[int, int],
    state: DeviceState,
    w: Outer,
    row_idx_R: Tensor,
    h_RD: Tensor,
) -> tuple[Tensor, Batch]:
    """The input of the next pass: each row's newest draft token beside the head's hidden state.

    The entry that is made of token t + 1 has the place of token t. `sizes` are those of a cache
    block and the last position.
    """
    rows = *state[:3], state.block_tables[0], row_idx_R
    token_R, *places = ops.draft_inputs(*rows, 1, -1, 0, *sizes)
    return again(w, token_R, h_RD), Batch(*places[:5])


def _outer(params: Params) -> Outer:
    return Outer(params.extra, params.embed_VD, params.final_norm_D)


@dataclass(frozen=True)
class DraftHead:
    """The proposer that runs a head over the hidden states after `layers`. It draws as
    `runner.draft.DraftModel` does."""

    num: int
    layers: tuple[int, ...]

    def propose(self, state: DeviceState, fed: Fed, steps: Steps) -> Tensor | None:
        """See `DeviceProposer`. K passes: over the step's own tokens, then token by token. None
        for K = 0, after the first of them, or the part of it that later passes need.

        A draft token at a position without a block is a poor one: its pass uses the padding block.
        """
        x_TJ, last_R = self._entered(state, fed, steps)
        if not self.num and self._stores(fed, steps, x_TJ):
            return None
        own = steps.state._replace(token_S=state.token_S.clone(), pos_S=state.pos_S.clone())
        ahead = replace(steps, state=own)
        is_one = fed.phase == "decode"  # a token of each row
        keep_R = None if is_one else last_R
        # after each row's last accepted token
        h_RD = steps._layers(fed.phase, x_TJ, fed.batch, fed.max_q_len, keep_R)
        found = []
        for number in range(self.num):
            if number:
                h_RD = self._again(ahead, fed.row_idx_R, h_RD)
            found.append(self._drawn(ahead, fed.row_idx_R, h_RD))
        return torch.stack(found, 1) if found else None

    def _entered(self, state: DeviceState, fed: Fed, steps: Steps) -> tuple[Tensor, Tensor]:
        """The input [T, J] of the head's layer for the tokens that the step has fed, and the index
        of each row's last accepted token."""
        model, params = steps.model, steps.params
        assert isinstance(model, HeadModel)
        sizes = (fed.token_T.shape[0], fed.row_idx_R.shape[0])
        token_T, last_R = steps._run(
            "following",
            sizes,
            following,
            state=state,
            token_T=fed.token_T,
            batch=fed.batch,
            row_idx_R=fed.row_idx_R,
        )
        x_TJ = steps._run(
            "enter",
            sizes[:1],
            partial(model.enter, model.config),
            w=_outer(params),
            token_T=token_T,
            states_TJ=fed.states_TJ,
        )
        return x_TJ, last_R

    def _stores(self, fed: Fed, steps: Steps, x_TJ: Tensor) -> bool:
        """Write keys and values alone, if the head can: less than its layer reads."""
        model = steps.model
        assert isinstance(model, HeadModel)
        if model.store is None:
            return False
        steps._run(
            "store",
            (len(x_TJ),),
            partial(model.store, model.config),
            w=steps.params.layers[0],
            kv=steps.caches[0],
            cos_sin_MH=steps.cos_sin_MH,
            place=(fed.batch.rope_pos_T, fed.batch.slot_T),
            x_TJ=x_TJ,
        )
        return True

    def _again(self, ahead: Steps, row_idx_R: Tensor, h_RD: Tensor) -> Tensor:
        """The hidden states [R, D] after the newest draft tokens."""
        model, params = ahead.model, ahead.params
        assert isinstance(model, HeadModel)
        sizes = ahead.block_size, ahead.cos_sin_MH.shape[0] - 1
        x_RJ, batch = ahead._run(
            "again",
            (row_idx_R.shape[0],),
            partial(begin_again, partial(model.again, model.config), sizes),
            state=ahead.state,
            w=_outer(params),
            row_idx_R=row_idx_R,
            h_RD=h_RD,
        )
        return ahead._layers("decode", x_RJ, batch, 1)

    def _drawn(self, ahead: Steps, row_idx_R: Tensor, h_RD: Tensor) -> Tensor:
        """Draw token_R, and make them the newest of `ahead`."""
        cfg, params = ahead.model.config, ahead.params
        target_X: Tensor | None = getattr(params.extra, "target_X", None)
        logits_RX = ahead._head(h_RD)
        if target_X is None:
            return ahead.sample(row_idx_R, logits_RX)
        if cfg.num_ranks > 1:
            # the tokens of one rank's part of the head may be anywhere in the vocabulary
            logits_RX = ops.gather_columns(logits_RX, len(target_X))
        token_R: Tensor = ahead._run(
            "sample",
            (h_RD.shape[0], "of"),
            partial(choose_of_target, cfg.vocab_size),
            state=ahead.state,
            row_idx_R=row_idx_R,
            target_X=target_X,
            logits_RX=logits_RX,
        )
        return token_R


def choose_of_target(
    vocab_size: int, state: DeviceState, row_idx_R: Tensor, target_X: Tensor, logits_RX: Tensor
) -> Tensor:
    """`choose_and_advance` from the tokens that a head can draft."""
    return choose_and_advance(state, row_idx_R, logits_RX, draw=draw_of(target_X, vocab_size))
