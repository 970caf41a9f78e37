"""The proposer that drafts a block of tokens in one pass (`models.dflash`).

R rows | T tokens | K draft tokens a row | B tokens of a block: K + 1, or K if the newest token's
output is the first draft token | X = R · B | D hidden | V vocabulary | M rank of a Markov head
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.dflash import BlockModel, DFlashConfig
from nanovllm.models.draft_head import Outer
from nanovllm.models.formats import Weight, linear
from nanovllm.models.model import Batch
from nanovllm.runner.draft_head import draw_of
from nanovllm.runner.proposer import Fed
from nanovllm.runner.state import DeviceState, choose
from nanovllm.runner.vocab_parallel import drawing

if TYPE_CHECKING:
    from nanovllm.runner.steps import Steps


class BlockTokens(NamedTuple):
    """The tokens of blocks: rows of the state, and numbers within the block from 0 on."""

    row_X: Tensor
    ahead_X: Tensor


def begin_block(
    cfg: DFlashConfig,
    sizes: tuple[int, int, int],
    state: DeviceState,
    embed_VD: Weight,
    row_idx_R: Tensor,
) -> tuple[Tensor, BlockTokens, Batch]:
    """Embeddings [X, D] of each row's newest token and mask tokens, and their places.

    `sizes` are those of the block, of a cache block and the last position.
    """
    num, block_size, last_pos = sizes
    rows = *state[:3], state.block_tables[0], row_idx_R
    made = ops.draft_inputs(*rows, num, 0, cfg.mask_id, block_size, last_pos)
    token_X, *places, row_X, ahead_X = made
    return dense.embed(cfg, embed_VD, token_X), BlockTokens(row_X, ahead_X), Batch(*places)


def end_block(
    cfg: DFlashConfig,
    num: int,
    state: DeviceState,
    w: Outer,
    head_VD: Weight,
    tokens: BlockTokens,
    h_XD: Tensor,
) -> Tensor:
    """The draft tokens [R, K] that the outputs of mask tokens give, by temperature and noise. Those
    of the newest tokens are computed, too, and dropped, unless they are the first draft tokens:
    without them the outputs would be copied.
    """
    logits_XV = dense.head(cfg, w.final_norm_D, head_VD, h_XD)
    target_X, draw = w.extra.target_X, drawing(cfg, choose)
    if cfg.num_ranks > 1 and (target_X is not None or cfg.markov_rank):
        # each has the logits of some of these tokens
        num_columns = cfg.vocab_size if target_X is None else len(target_X)
        logits_XV, draw = ops.gather_columns(logits_XV, num_columns), choose
    if target_X is not None:
        draw = partial(choose, draw=draw_of(target_X, cfg.vocab_size))
    first = 0 if cfg.from_anchor else 1
    ahead_X = tokens.ahead_X + 1 if cfg.from_anchor else tokens.ahead_X
    if cfg.markov_rank:
        rows, blocks = tokens.row_X.view(-1, num), ahead_X.view(-1, num)
        inputs = zip(rows.unbind(1), logits_XV.unflatten(0, (-1, num)).unbind(1), blocks.unbind(1))
        return _chained(w, state, draw, list(inputs)[first:])
    token_X: Tensor = draw(state, tokens.row_X, logits_XV, ahead_X)
    return token_X.unflatten(0, (-1, num)).narrow(1, first, num - first)


def _chained(
    w: Outer,
    state: DeviceState,
    draw: Callable[..., Tensor],
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> Tensor:
    """Tokens [R, K], each from logits to which the one before adds its own. `inputs` are those of
    `choose` at each place: rows, logits, numbers."""
    token_R, found = state.token_S.index_select(0, inputs[0][0]), []
    for row_R, logits_RV, ahead_R in inputs:
        before_RM = torch.nn.functional.embedding(token_R, w.extra.before_VM)
        token_R = draw(state, row_R, logits_RV + linear(before_RM, w.extra.after_XM, None), ahead_R)
        found.append(token_R)
        token_R = token_R.clamp(min=0)
    return torch.stack(found, 1)


@dataclass(frozen=True)
class DraftBlock:
    """The proposer that runs a `BlockModel` over the hidden states after `layers`."""

    num: int
    layers: tuple[int, ...]

    def propose(self, state: DeviceState, fed: Fed, steps: Steps) -> Tensor | None:
        """See `DeviceProposer`. Two passes: the context of the step's own tokens, and the block.
        None for K = 0, after the first of them.

        A draft token at a position without a block is a poor one: it uses the padding block.
        """
        model, params = steps.model, steps.params
        assert isinstance(model, BlockModel) and isinstance(model.config, DFlashConfig)
        self._store_context(model, fed, steps)
        if not self.num:
            return None
        num, rows = self.num + (not model.config.from_anchor), (fed.row_idx_R.shape[0], self.num)
        sizes = (num, steps.block_size, steps.cos_sin_MH.shape[0] - 1)
        h_XD, tokens, batch = steps._run(
            "begin_block",
            rows,
            partial(begin_block, model.config, sizes),
            state=steps.state,
            embed_VD=params.embed_VD,
            row_idx_R=fed.row_idx_R,
        )
        token_RK: Tensor = steps._run(
            "end_block",
            rows,
            partial(end_block, model.config, num),
            state=steps.state,
            w=Outer(params.extra, params.embed_VD, params.final_norm_D),
            head_VD=params.head_VD,
            tokens=tokens,
            h_XD=steps._layers("decode", h_XD, batch, 1),
        )
        return token_RK

    def _store_context(self, model: BlockModel, fed: Fed, steps: Steps) -> None:
        """Write keys and values of the step's tokens. Those of rejected ones are overwritten by the
        next block."""
        num_tokens = fed.token_T.shape[0]
        context_TD = steps._run(
            "context",
            (num_tokens,),
            partial(model.context, model.config),
            w=steps.params.extra,
            states_TJ=fed.states_TJ,
        )
        for weights, cache in zip(steps.params.layers, steps.caches):
            steps._run(
                "store",
                (num_tokens,),
                partial(model.store, model.config),
                w=weights,
                kv=cache,
                cos_sin_MH=steps.cos_sin_MH,
                place=(fed.batch.rope_pos_T, fed.batch.slot_T),
                x_TD=context_TD,
            )
