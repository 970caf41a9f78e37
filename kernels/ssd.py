"""The recurrence of Mamba-2 in chunks of tokens, in plain torch with static shapes.

Within a chunk the results are products of matrices, as of attention without a softmax. Only the
states go from chunk to chunk, and each is a factor times the one before it plus what its chunk
writes.

Shapes: T tokens | R rows | Z chunks | L tokens of a chunk. Others are those of the reference.

Source: Dao and Gu 2024, https://arxiv.org/abs/2405.21060, section 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.gated_delta import CHUNK, chunks


def ssd(
    xbc_TC: Tensor,
    dt_TV: Tensor,
    log_decay_TV: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
) -> Tensor:
    """`reference.ssd.ssd`; all sizes depend on shapes alone."""
    out_TVI, after_NVHI, to_N = computed(
        xbc_TC, dt_TV, log_decay_TV, state_XVHI, q_start_S, from_R, is_new_R, to_R, to_T
    )
    reference.step.store_state(after_NVHI, state_XVHI, to_N)
    return out_TVI


def computed(
    xbc_TC: Tensor,
    dt_TV: Tensor,
    log_decay_TV: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor | None,
    to_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results [T, V, I], states [N, V, H, I], and the places [N] where they go."""
    start_RVHI = reference.gated_delta.start_states(state_XVHI, from_R, is_new_R)
    others = (log_decay_TV, start_RVHI, q_start_S)
    if to_R is None:
        assert to_T is not None
        of_heads = reference.ssd.inputs(xbc_TC, dt_TV, state_XVHI)
        return *token_by_token(*of_heads, *others), to_T
    return *in_chunks(*reference.ssd.parts(xbc_TC, dt_TV, state_XVHI), *others), to_R


def token_by_token(
    x_TVI: Tensor,
    b_TVH: Tensor,
    c_TVH: Tensor,
    log_decay_TV: Tensor,
    state_RVHI: Tensor,
    q_start_S: Tensor,
) -> tuple[Tensor, Tensor]:
    """The results and the states after all tokens, of rows with up to ⌈T / R⌉ tokens: the first of
    all rows, then the second, and so on."""
    num_tokens, num_rows = len(x_TVI), len(state_RVHI)
    row_T, idx_T, is_real_T = reference.gated_delta.owners(q_start_S, num_tokens)
    states = []
    for idx in range(-(-num_tokens // num_rows)):
        token_R = q_start_S[:-1].long() + idx
        is_fed_R = (token_R < q_start_S[1:].long()).view(-1, 1, 1, 1)
        at_R = token_R.clamp(max=num_tokens - 1)
        of_row = [one.index_select(0, at_R) for one in (x_TVI, b_TVH, log_decay_TV)]
        after_RVHI = reference.ssd.next_state(state_RVHI, *of_row)
        state_RVHI = torch.where(is_fed_R, after_RVHI, state_RVHI)
        states.append(state_RVHI)
    at_T = idx_T.clamp(max=len(states) - 1) * num_rows + row_T
    after_TVHI = torch.cat(states).index_select(0, at_T)
    y_TVI = (after_TVHI * c_TVH.unsqueeze(3)).sum(2)
    return torch.where(is_real_T.view(-1, 1, 1), y_TVI, 0), after_TVHI


def in_chunks(
    x_TVI: Tensor,
    b_TGH: Tensor,
    c_TGH: Tensor,
    log_decay_TV: Tensor,
    start_RVHI: Tensor,
    q_start_S: Tensor,
) -> tuple[Tensor, Tensor]:
    """The results and the rows' last states, in as many chunks as rows of any lengths can have.

    The heads of a group have the same B and C, so their values are columns of one product.
    """
    num_tokens, num_groups, device = len(x_TVI), b_TGH.shape[1], x_TVI.device
    num_chunks = num_tokens // CHUNK + len(start_RVHI)
    of = chunks(q_start_S, num_tokens, num_chunks)
    x, b, c, log_decay_ZVL = (of.of(one) for one in (x_TVI, b_TGH, c_TGH, log_decay_TV))
    # the decay from before the chunk to after token i, and that from after token j to after token i
    total_ZVL = log_decay_ZVL.cumsum(2)
    idx_L = torch.arange(CHUNK, device=device)
    between_ZVLL = total_ZVL.unsqueeze(3) - total_ZVL.unsqueeze(2)
    between_ZVLL = torch.where(idx_L.unsqueeze(1) >= idx_L, between_ZVLL, -torch.inf).exp()
    since_ZVL1, until_ZVL1 = (
        one.exp().unsqueeze(3) for one in (total_ZVL, total_ZVL[..., -1:] - total_ZVL)
    )
    score_ZGLL = c @ b.transpose(2, 3)
    score_ZGKLL = between_ZVLL.unflatten(1, (num_groups, -1)) * score_ZGLL.unsqueeze(2)
    y_ZVLI = score_ZGKLL.flatten(1, 2) @ x
    written_ZVHI = apart(b.transpose(2, 3) @ together(x * until_ZVL1, num_groups), x.shape[3])
    is_first_Z = torch.arange(num_chunks, device=device) == of.first_R.index_select(0, of.row_Z)
    start_ZVHI = start_RVHI.index_select(0, of.row_Z)
    state_VHI = torch.zeros_like(start_RVHI[0])
    before, after = [], []
    for z in range(num_chunks):
        state_VHI = torch.where(is_first_Z[z].view(1, 1, 1), start_ZVHI[z], state_VHI)
        before.append(state_VHI)
        state_VHI = state_VHI * since_ZVL1[z, :, -1:] + written_ZVHI[z]
        after.append(state_VHI)
    read_ZGLJ = c @ together(torch.stack(before), num_groups)
    y_ZVLI = y_ZVLI + apart(read_ZGLJ, x.shape[3]) * since_ZVL1
    last_R = (of.end_R - 1).clamp(0, num_chunks - 1)
    # a row without tokens keeps its state
    is_fed_R = (q_start_S[1:] > q_start_S[:-1]).view(-1, 1, 1, 1)
    last_RVHI = torch.where(is_fed_R, torch.stack(after).index_select(0, last_R), start_RVHI)
    return of.joined(y_ZVLI, q_start_S, num_tokens), last_RVHI


def together(x_ZVLI: Tensor, num_groups: int) -> Tensor:
    """The values of a group's heads beside each other: [Z, G, L, V / G · I]."""
    return x_ZVLI.unflatten(1, (num_groups, -1)).transpose(2, 3).flatten(3)


def apart(x_ZGLJ: Tensor, head_size: int) -> Tensor:
    """The reverse of `together`."""
    return x_ZGLJ.unflatten(3, (-1, head_size)).transpose(2, 3).flatten(1, 2)
