"""What drafting and verifying need beside the model: places of tokens, acceptance, norms of parts.

Shapes: see the package. K draft tokens a row | X = R · `num` tokens of blocks | P parts of a row
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.reference.norm_act import rms_norm
from nanovllm.kernels.reference.sample import sample
from nanovllm.kernels.reference.step import advance


def accept(
    token_T: Tensor,
    chosen_T: Tensor,
    num_tokens_R: Tensor,
    row_idx_R: Tensor,
    token_S: Tensor,
    pos_S: Tensor,
    num: int,
    seed_S: Tensor | None = None,
    rate: int = 0,
) -> tuple[Tensor, Tensor]:
    """Verify the tokens of each row against the tokens that the model chose, and advance the rows
    by the accepted ones, in place (`advance`).

    chosen_T[t] is the model's choice after token_T[t]. A chosen token is accepted if every earlier
    choice of its row equals the token that the row fed next. Returns (token_RK, a row's chosen
    tokens, K = `num`; count_R, the number of accepted ones: at least 1, at most the row's number of
    tokens). For rows without tokens, token_RK is undefined and count_R is 1. No row feeds NO_TOKEN,
    so only a row's last accepted token can be that.

    With seed_S a share `rate` / 2³¹ of the drafts is accepted at random, by seed and position: each
    choice but a row's last is the token that the row feeds next, or another one. Only for
    benchmarks: the model has no part in it.

    Source: greedy verification of Leviathan et al. 2023, https://arxiv.org/abs/2211.17192. Noise is
    a function of seed and position, so sampled tokens are verified in the same way as greedy ones.
    """
    end_R = num_tokens_R.cumsum(0)
    step_K = torch.arange(num, device=token_T.device)
    index_RK = ((end_R - num_tokens_R).unsqueeze(1) + step_K).clamp(max=token_T.shape[0] - 1)
    token_RK, chosen_RK = (
        x_T.index_select(0, index_RK.flatten()).view_as(index_RK) for x_T in (token_T, chosen_T)
    )
    is_past_RJ = step_K[1:] >= num_tokens_R.unsqueeze(1)
    if seed_S is not None:
        x_RK = random_bits((pos_S[row_idx_R].unsqueeze(1) + step_K + 1), seed_S[row_idx_R])
        next_RJ = token_RK[:, 1:]
        wrong_RJ = torch.where(next_RJ == 0, 1, next_RJ - 1)
        drafted_RJ = torch.where(x_RK[:, :-1] < rate, next_RJ, wrong_RJ)
        drafted_RJ = torch.where(is_past_RJ, chosen_RK[:, :-1], drafted_RJ)
        chosen_RK = torch.cat((drafted_RJ, chosen_RK[:, -1:]), 1)
    is_wrong_RJ = (token_RK[:, 1:] != chosen_RK[:, :-1]) | is_past_RJ
    count_R = (is_wrong_RJ.long().cumsum(1) == 0).sum(1) + 1
    newest_R = chosen_RK.gather(1, (count_R - 1).unsqueeze(1)).squeeze(1)
    advance(token_S, pos_S, row_idx_R, newest_R, count_R)
    return chosen_RK, count_R


def random_bits(pos_RK: Tensor, seed_R: Tensor) -> Tensor:
    """31 bits for each position, by a hash."""
    x_RK = pos_RK * 40503 + (seed_R % 65521).unsqueeze(1)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        x_RK = (x_RK & 0x7FFFFFFF) ^ ((x_RK & 0x7FFFFFFF) >> shift)
        x_RK = (x_RK * factor) & 0x7FFFFFFF
    return x_RK


def next_tokens(
    token_S: Tensor,
    pos_S: Tensor,
    row_idx_R: Tensor,
    fed_T: Tensor,
    seq_len_R: Tensor,
    q_start: Tensor,
) -> tuple[Tensor, Tensor]:
    """After a step that has fed fed_T: (the token after each, and the index of each row's last
    accepted token, whose successor is the row's newest). The successors of rejected tokens and of
    padding rows' are any tokens.

    Row r has fed tokens q_start[r] .. q_start[r + 1] − 1; seq_len_R is its length with them. The
    row has moved from its position before the step by the number of accepted tokens.
    """
    num_tokens = fed_T.shape[0]
    first_R = q_start[:-1].long()
    before_R = seq_len_R - (q_start[1:] - first_R)
    last_R = (first_R + pos_S[row_idx_R] - before_R - 1).clamp(0, num_tokens - 1)
    next_T = torch.cat((fed_T[1:], fed_T[:1], fed_T[:1]))
    # padding rows write beyond the end
    place_R = torch.where(row_idx_R == token_S.shape[0] - 1, num_tokens, last_R)
    next_T = next_T.scatter(0, place_R, token_S[row_idx_R])
    return next_T[:num_tokens], last_R


def draft_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    num: int,
    shift: int,
    mask_id: int,
    block_size: int,
    last_pos: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a pass over blocks of `num` tokens: a row's newest one, at position
    pos_S + `shift`, and `mask_id` at those after it. Positions are 0 … `last_pos`.

    Every token is a row of its own, with the keys of the whole block: so each sees all of them.
    Returns (token_X, rope_pos_X, slot_X, block_table_XP, seq_len_X, q_start) as `decode_inputs`
    does, row_X, the rows of the state, and ahead_X, a token's number within its block from 0 on.
    """
    ahead_X = torch.arange(num, device=row_idx_R.device).repeat(row_idx_R.shape[0])
    row_X = row_idx_R.repeat_interleave(num, output_size=row_idx_R.shape[0] * num)
    first_X = pos_S[row_X] + shift
    pos_X = (first_X + ahead_X).clamp(0, last_pos)
    end_X = (first_X + num - 1).clamp(0, last_pos) + 1
    table_XP = block_table_SP[row_X]
    block_X = table_XP.gather(1, (pos_X // block_size).unsqueeze(1)).squeeze(1)
    return (
        torch.where(ahead_X == 0, token_S[row_X], mask_id),
        pos_X + rope_offset_S[row_X],
        block_X.long() * block_size + pos_X % block_size,
        table_XP,
        end_X.int(),
        torch.arange(row_X.shape[0] + 1, dtype=torch.int32, device=row_X.device),
        row_X,
        ahead_X,
    )


def sample_of(
    logits_RX: Tensor,
    token_X: Tensor,
    vocab_size: int,
    temperature_R: Tensor,
    seed_R: Tensor,
    pos_R: Tensor,
) -> Tensor:
    """`sample` from a vocabulary of which only token_X, in ascending order, have logits."""
    logits_RV = logits_RX.new_full((logits_RX.shape[0], vocab_size), float("-inf"))
    return sample(logits_RV.index_copy(1, token_X, logits_RX), temperature_R, seed_R, pos_R)


def rms_norm_each(x_TD: Tensor, weight_PE: Tensor, eps: float) -> Tensor:
    """`rms_norm` of each of the P parts of a row, D = P · E, with weights of its own."""
    parts_TPE = x_TD.unflatten(1, (weight_PE.shape[0], -1))
    return rms_norm(parts_TPE, weight_PE, eps).flatten(1)
