"""The proposer that drafts a block of tokens in one pass (`models.dflash`).

R rows | T tokens | K draft tokens a row | B = K + 1 tokens of a block | X = R · B | N = R · K
D hidden | V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.dflash import BlockModel, DFlashConfig
from nanovllm.models.draft_head import Outer, of_target
from nanovllm.models.formats import Weight
from nanovllm.models.model import Batch
from nanovllm.runner.proposer import Fed
from nanovllm.runner.state import DeviceState, choose
from nanovllm.runner.vocab_parallel import drawing

if TYPE_CHECKING:
    from nanovllm.runner.steps import Steps


def begin_block(
    cfg: DFlashConfig,
    sizes: tuple[int, int, int],
    state: DeviceState,
    embed_VD: Weight,
    row_idx_R: Tensor,
) -> tuple[Tensor, Batch]:
    """Embeddings [X, D] of each row's newest token and mask tokens, and their places.

    Every token is a row of its own, with the keys of the whole block: so each sees all of them.
    `sizes` are those of the block, of a cache block and the last position.
    """
    num, block_size, last_pos = sizes
    offset_B = torch.arange(num, device=row_idx_R.device)
    pos_RB = state.pos_S.index_select(0, row_idx_R).unsqueeze(1) + offset_B
    pos_X = pos_RB.clamp(max=last_pos).flatten()
    token_R1 = state.token_S.index_select(0, row_idx_R).unsqueeze(1)
    token_X = torch.where(offset_B == 0, token_R1, cfg.mask_id).flatten()
    rows_X = row_idx_R.repeat_interleave(num)
    places = (one.index_select(0, rows_X) for one in (state.rope_offset_S, state.block_tables[0]))
    token_X, *batch = ops.decode_inputs(
        token_X, pos_X, *places, torch.arange(len(rows_X), device=rows_X.device), block_size
    )
    end_X = (pos_RB[:, -1:].clamp(max=last_pos) + 1).expand_as(pos_RB).flatten().int()
    return dense.embed(cfg, embed_VD, token_X), Batch(*batch)._replace(seq_len_R=end_X)


def end_block(
    cfg: DFlashConfig,
    num: int,
    state: DeviceState,
    w: Outer,
    head_VD: Weight,
    row_idx_R: Tensor,
    h_XD: Tensor,
) -> Tensor:
    """The draft tokens [R, K] that the outputs of mask tokens give, by temperature and noise."""
    h_RBD = h_XD.unflatten(0, (-1, num))
    logits_NV = dense.head(cfg, w.final_norm_D, head_VD, h_RBD[:, 1:].flatten(0, 1))
    target_X, draw = w.extra.target_X, drawing(cfg, choose)
    if target_X is not None:
        if cfg.num_ranks > 1:  # each has the logits of some of these tokens
            logits_NV = ops.gather_columns(logits_NV, len(target_X))
        logits_NV, draw = of_target(cfg, target_X, logits_NV), choose
    rows_N = row_idx_R.repeat_interleave(num - 1)
    ahead_N = torch.arange(1, num, device=rows_N.device).repeat(len(row_idx_R))
    token_N: Tensor = draw(state, rows_N, logits_NV, ahead_N)
    return token_N.unflatten(0, (-1, num - 1))


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
        num, rows = self.num + 1, (fed.row_idx_R.shape[0], self.num)
        sizes = (num, steps.block_size, steps.cos_sin_MH.shape[0] - 1)
        h_XD, batch = steps._run(
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
            row_idx_R=fed.row_idx_R,
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
            hidden=fed.hidden,
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
