"""Index arithmetic of a step: its inputs, and what it changes in the state of rows.

Shapes: see the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAFT = -2  # of `schedule.plan`: the row's next draft token


def decode_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a step in which every row feeds its newest token, at position pos_S.

    Returns (token_R, rope_pos_R, slot_R, block_table_RP, seq_len_R, q_start):
    rope_pos = pos + rope_offset; slot = block_table[pos // B] · B + pos % B; seq_len = pos + 1;
    q_start = 0 … R.
    """
    pos_R = pos_S[row_idx_R]
    table_RP = block_table_SP[row_idx_R]
    block_R = table_RP.gather(1, (pos_R // block_size).unsqueeze(1)).squeeze(1)
    slot_R = block_R.long() * block_size + pos_R % block_size
    q_start = torch.arange(row_idx_R.shape[0] + 1, dtype=torch.int32, device=row_idx_R.device)
    rope_pos_R = pos_R + rope_offset_S[row_idx_R]
    return token_S[row_idx_R], rope_pos_R, slot_R, table_RP, (pos_R + 1).int(), q_start


def span_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    num_tokens_R: Tensor,
    given_T: Tensor,
    block_size: int,
    draft_SK: Tensor | None = None,
    each: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a step in which row r feeds num_tokens_R[r] tokens, from position pos_S on.

    given_T holds the tokens, row after row; −1 stands for the row's newest token, token_S. With
    draft_SK −2 stands for a draft token: a row's second token is its first one. Tokens after those
    of the last row are padding: they belong to the last row of the state and write to slots of
    block 0.

    Returns (token_T, rope_pos_T, slot_T, block_table_RP, seq_len_R, q_start, row_T, num_T, last_R):
    position, slot and rope_pos of each token as in `decode_inputs`; seq_len = pos + num_tokens, 0
    for a row without tokens; row r owns tokens q_start[r] .. q_start[r + 1] − 1; row_T is each
    token's row of the state, num_T its number within its row, from 1 on; last_R is the index of
    each row's last token, 0 for padding rows at the front. With `each` every token is a row of its
    own: block_table_TP, seq_len_T, which is 1 for padding, and q_start = 0 … T.
    """
    num_tokens, num_rows = given_T.shape[0], row_idx_R.shape[0]
    end_R = num_tokens_R.cumsum(0)
    token_idx_T = torch.arange(num_tokens, device=given_T.device)
    is_real_T = token_idx_T < end_R[-1:]
    r_T = (token_idx_T.unsqueeze(1) >= end_R).sum(1).clamp(max=num_rows - 1)
    row_T = torch.where(is_real_T, row_idx_R[r_T], pos_S.shape[0] - 1)
    index_T = torch.where(is_real_T, token_idx_T - (end_R - num_tokens_R)[r_T], 0)
    pos_T = pos_S[row_T] + index_T
    flat_T = row_T * block_table_SP.shape[1] + pos_T // block_size
    slot_T = block_table_SP.flatten()[flat_T].long() * block_size + pos_T % block_size
    slot_T = torch.where(is_real_T, slot_T, token_idx_T % block_size)
    table_RP, q_start = block_table_SP[row_idx_R], torch.cat((torch.zeros_like(end_R[:1]), end_R))
    seq_len_R = torch.where(num_tokens_R > 0, pos_S[row_idx_R] + num_tokens_R, 0)
    if each:
        table_RP, seq_len_R = block_table_SP[row_T], pos_T + 1
        q_start = torch.arange(num_tokens + 1, device=given_T.device)
    token_T = torch.where(given_T < 0, token_S[row_T], given_T)
    if draft_SK is not None:
        draft_T = draft_SK[row_T, (index_T - 1).clamp(0, draft_SK.shape[1] - 1)]
        token_T = torch.where(given_T == DRAFT, draft_T, token_T)
    return (
        token_T,
        pos_T + rope_offset_S[row_T],
        slot_T,
        table_RP,
        seq_len_R.int(),
        q_start.int(),
        row_T,
        index_T + 1,
        (end_R - 1).clamp(min=0),
    )


def store_state(x: Tensor, state: Tensor, index_N: Tensor) -> None:
    """state[index_N[n]] = x[n] for x [N, …] and state [X, …], in place, in the state's dtype.

    An index may occur several times only if the row is padding: which of them stays is undefined.
    """
    state.index_copy_(0, index_N, x.to(state.dtype))


def sampling_inputs(
    pos_S: Tensor,
    sampling_SF: Tensor,
    seed_S: Tensor,
    row_idx_R: Tensor,
    num_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (temperature_R, seed_R, position_R of the token to sample).

    The position is pos_S + num_R, or pos_S + 1 without num_R. The temperature is sampling field 0.
    """
    num = 1 if num_R is None else num_R
    return sampling_SF[row_idx_R, 0], seed_S[row_idx_R], pos_S[row_idx_R] + num


def advance(
    token_S: Tensor, pos_S: Tensor, row_idx_R: Tensor, token_R: Tensor, num_R: Tensor | None = None
) -> None:
    """token_S[row] = token_R, or 0 for NO_TOKEN, and pos_S[row] += num_R (1 without num_R), in
    place.

    Only padding uses the last row of the state, any number of times in one step: it stays at token
    0, position 0. Every other row occurs at most once.
    """
    is_real_R = row_idx_R != token_S.shape[0] - 1
    num = 1 if num_R is None else num_R
    token_S.index_copy_(0, row_idx_R, torch.where(is_real_R, token_R, 0).clamp(min=0))
    pos_S.index_copy_(0, row_idx_R, torch.where(is_real_R, pos_S[row_idx_R] + num, 0))


def ngram_propose(
    history_SM: Tensor,
    draft_SK: Tensor,
    token_S: Tensor,
    pos_S: Tensor,
    row_idx_R: Tensor,
    min_n: int,
    max_n: int,
    past_C: Tensor | None = None,
) -> None:
    """Draft the tokens that followed an earlier occurrence of a row's last tokens, in place.

    history_SM int32 has the row's tokens before position pos_S; token_S, at pos_S, is written to
    it. Of all n from max_n down to min_n, the largest is taken for which the last n tokens occur
    earlier, perhaps overlapping, and of its occurrences the first. draft_SK gets the K tokens after
    it; the tokens after the last one are those from there again. Without an occurrence, or with
    pos_S ≥ M, they are 0. The K tokens are also written to history_SM after position pos_S, as far
    as it reaches: if the next step accepts some, they are in their places.

    With past_C int32, texts that end with −1 each, occurrences in these count as well: the first of
    the longest, if it is longer than all of the row's own. Then draft_SK gets the tokens after it
    up to the text's end, and 0 for the others.

    Only padding uses a row several times in one step, with token 0 at position 0.

    Source: prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding; vLLM's choice of
    the occurrence.
    """
    num_positions, num = history_SM.shape[1], draft_SK.shape[1]
    pos_R, token_R = pos_S[row_idx_R], token_S[row_idx_R]
    place_M = torch.arange(num_positions, device=pos_R.device)
    history_RM = torch.where(
        place_M == pos_R.unsqueeze(1), token_R.unsqueeze(1), history_SM[row_idx_R].long()
    )
    is_end_RM = place_M < torch.where(pos_R < num_positions, pos_R, 0).unsqueeze(1)
    length_RM = torch.zeros_like(history_RM)
    for back in range(max_n):
        last_R1 = history_RM.gather(1, (pos_R - back).clamp(0, num_positions - 1).unsqueeze(1))
        is_end_RM = is_end_RM & (history_RM.roll(back, 1) == last_R1) & (place_M >= back)
        length_RM += is_end_RM
    key_RM = torch.where(length_RM >= min_n, (length_RM + 1) * num_positions - place_M, 0)
    key_R, end_R = key_RM.max(1)
    period_R1 = (pos_R - end_R).clamp(min=1).unsqueeze(1)
    step_K = torch.arange(num, device=pos_R.device)
    from_RK = end_R.unsqueeze(1) + 1 + step_K % period_R1
    draft_RK = history_RM.gather(1, from_RK.clamp(max=num_positions - 1))
    draft_RK = torch.where((key_R > 0).unsqueeze(1), draft_RK, 0)
    if past_C is not None:
        own_R = torch.where(key_R > 0, length_RM.gather(1, end_R.unsqueeze(1)).squeeze(1), 0)
        found = _past_drafts(past_C, history_RM, pos_R, max_n, num)
        is_past_R = (found[0] > own_R) & (found[0] >= min_n) & (pos_R < num_positions)
        draft_RK = torch.where(is_past_R.unsqueeze(1), found[1], draft_RK)
    draft_SK.index_copy_(0, row_idx_R, draft_RK)
    for offset, written_R in enumerate((token_R, *draft_RK.unbind(1))):
        to_R = pos_R + offset
        is_in_R = to_R < num_positions
        to_R = to_R.clamp(max=num_positions - 1)
        kept_R = torch.where(is_in_R, written_R, history_SM[row_idx_R, to_R].long())
        history_SM.index_put_((row_idx_R, to_R), kept_R.int())


def _past_drafts(
    past_C: Tensor, history_RM: Tensor, pos_R: Tensor, max_n: int, num: int
) -> tuple[Tensor, Tensor]:
    """The length [R] of the longest occurrence in the past of each row's last tokens, and the
    tokens [R, K] after the first of those."""
    place_C, past_1C = torch.arange(len(past_C), device=pos_R.device), past_C.long().unsqueeze(0)
    is_end_RC = torch.ones_like(past_1C, dtype=torch.bool)
    length_RC = torch.zeros_like(past_1C)
    for back in range(max_n):
        before_R1 = (pos_R - back).unsqueeze(1)
        last_R1 = history_RM.gather(1, before_R1.clamp(0, history_RM.shape[1] - 1))
        is_end_RC = is_end_RC & (past_1C.roll(back, 1) == last_R1)
        is_end_RC = is_end_RC & (place_C >= back) & (before_R1 >= 0)
        length_RC = length_RC + is_end_RC
    key_RC = length_RC * len(past_C) + (len(past_C) - 1 - place_C)
    end_R1 = key_RC.argmax(1, keepdim=True)
    from_RK = end_R1 + 1 + torch.arange(num, device=pos_R.device)
    after_RK = past_1C.squeeze(0)[from_RK.clamp(max=len(past_C) - 1)]
    is_ended_RK = ((after_RK < 0) | (from_RK >= len(past_C))).long().cumsum(1) > 0
    return length_RC.gather(1, end_R1).squeeze(1), torch.where(is_ended_RK, 0, after_RK)
