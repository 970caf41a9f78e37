"""The gated delta rule of prompts in chunks of tokens, in plain torch with static shapes.

Within a chunk the rule is a system of linear equations, whose matrix is unit lower triangular: its
inverse gives what all tokens of the chunk write, as a function of the state before the chunk (the
WY form). The states then go from chunk to chunk, in products of matrices.

Shapes: T tokens | R rows | Z chunks | L tokens of a chunk. Others are those of the reference.

Source: Yang et al. 2024, https://arxiv.org/abs/2406.06484, section 3, and 2412.06464, section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.reference.gated_delta import gates, heads

CHUNK = 64  # tokens


class Chunks(NamedTuple):
    """The tokens of rows in chunks: chunks of a row follow each other, and only its last one may be
    shorter. Rows begin with chunk first_R."""

    first_R: Tensor
    end_R: Tensor
    row_Z: Tensor
    token_ZL: Tensor
    is_real_ZL: Tensor

    def of(self, x_TV: Tensor) -> Tensor:
        """[Z, V, L, …] of a tensor [T, V, …], zeros where there is no token."""
        picked = x_TV.index_select(0, self.token_ZL.flatten())
        x_ZLV = picked.view(*self.token_ZL.shape, *x_TV.shape[1:])
        is_real = self.is_real_ZL.view(*self.is_real_ZL.shape, *(1,) * (x_TV.dim() - 1))
        return torch.where(is_real, x_ZLV, 0).transpose(1, 2)

    def joined(self, x_ZVLI: Tensor, q_start_S: Tensor, num_tokens: int) -> Tensor:
        """[T, V, I] of [Z, V, L, I], zeros for tokens without a row."""
        row_T, idx_T, is_real_T = reference.gated_delta.owners(q_start_S, num_tokens)
        place_T = (self.first_R.index_select(0, row_T) + idx_T // CHUNK) * CHUNK + idx_T % CHUNK
        x_PVI = x_ZVLI.transpose(1, 2).flatten(0, 1)
        x_TVI = x_PVI.index_select(0, place_T.clamp(max=len(x_PVI) - 1))
        return torch.where(is_real_T.view(-1, 1, 1), x_TVI, 0)


def chunks(q_start_S: Tensor, num_tokens: int, num_chunks: int) -> Chunks:
    """The chunks of rows, and as many empty ones as `num_chunks` asks for."""
    start_R, stop_R = q_start_S[:-1].long(), q_start_S[1:].long()
    num_R = (stop_R - start_R + (CHUNK - 1)) // CHUNK
    end_R = num_R.cumsum(0)
    chunk_Z = torch.arange(num_chunks, device=q_start_S.device)
    row_Z = (chunk_Z.unsqueeze(1) >= end_R).sum(1).clamp(max=len(num_R) - 1)
    start_Z, stop_Z, first_Z = (x.index_select(0, row_Z) for x in (start_R, stop_R, end_R - num_R))
    token_Z = start_Z + (chunk_Z - first_Z) * CHUNK
    token_ZL = token_Z.unsqueeze(1) + torch.arange(CHUNK, device=q_start_S.device)
    is_real_ZL = token_ZL < stop_Z.unsqueeze(1)
    return Chunks(end_R - num_R, end_R, row_Z, token_ZL.clamp(max=num_tokens - 1), is_real_ZL)


def inverse_of_unit_lower(a_ZVLL: Tensor) -> Tensor:
    """(I + A)⁻¹ for strictly lower triangular A, whose size is a power of two.

    The inverse of [[P, 0], [B, Q]] is [[P⁻¹, 0], [−Q⁻¹ B P⁻¹, Q⁻¹]]: blocks of 1, 2, 4, … are
    inverted from those of half their size. Unlike powers of A, their numbers do not grow.
    """
    size = a_ZVLL.shape[-1]
    idx_L = torch.arange(size, device=a_ZVLL.device)
    inverse = (idx_L.unsqueeze(1) == idx_L).to(a_ZVLL.dtype).expand_as(a_ZVLL)
    half = 1
    while half < size:
        is_pair_LL = (idx_L // (2 * half)).unsqueeze(1) == idx_L // (2 * half)
        is_below_LL = (idx_L // half).unsqueeze(1) > idx_L // half
        b_ZVLL = torch.where(is_pair_LL & is_below_LL, a_ZVLL, 0)
        inverse = inverse - inverse @ b_ZVLL @ inverse
        half *= 2
    return inverse


def gated_delta(
    qkv_TC: Tensor,
    ba_TJ: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
) -> Tensor:
    """`reference.gated_delta.gated_delta`; all sizes depend on shapes alone."""
    inputs = (qkv_TC, ba_TJ, a_log_V, dt_bias_V, state_XVHI, q_start_S, from_R, is_new_R)
    out_TVI, after_NVHI, to_N = computed(*inputs, to_R, to_T)
    reference.step.store_state(after_NVHI, state_XVHI, to_N)
    return out_TVI


def gated_delta_cpu(
    qkv_TC: Tensor,
    ba_TJ: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
) -> Tensor:
    """The same without empty chunks: the host reads the rows' numbers of tokens."""
    inputs = (qkv_TC, ba_TJ, a_log_V, dt_bias_V, state_XVHI, q_start_S, from_R, is_new_R)
    num_R = q_start_S[1:] - q_start_S[:-1]
    num_chunks = max(1, int(((num_R + (CHUNK - 1)) // CHUNK).sum()))
    out_TVI, after_NVHI, to_N = computed(*inputs, to_R, to_T, num_chunks)
    reference.step.store_state(after_NVHI, state_XVHI, to_N)
    return out_TVI


def computed(
    qkv_TC: Tensor,
    ba_TJ: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor | None,
    to_T: Tensor | None,
    num_chunks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rule's results [T, V, I], states [N, V, H, I], and the places [N] where they go.

    Without `num_chunks` there are as many as rows of any lengths can have.
    """
    given = (qkv_TC, ba_TJ, a_log_V, dt_bias_V, state_XVHI, q_start_S, from_R, is_new_R)
    if to_R is None:
        assert to_T is not None
        return *token_by_token(*given), to_T
    if num_chunks is None:
        num_chunks = len(qkv_TC) // CHUNK + len(from_R)
    return *in_chunks(*given, num_chunks), to_R


def token_by_token(
    qkv_TC: Tensor,
    ba_TJ: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """The results and the states after all tokens, of rows with up to ⌈T / R⌉ tokens: the first of
    all rows, then the second, and so on."""
    num_tokens, num_rows = len(qkv_TC), len(from_R)
    q_TVH, k_TVH, v_TVI = heads(qkv_TC, state_XVHI)
    beta_TV, log_decay_TV = gates(ba_TJ, a_log_V, dt_bias_V)
    row_T, idx_T, is_real_T = reference.gated_delta.owners(q_start_S, num_tokens)
    state_RVHI = reference.gated_delta.start_states(state_XVHI, from_R, is_new_R)
    states = []
    for idx in range(-(-num_tokens // num_rows)):
        token_R = q_start_S[:-1].long() + idx
        is_fed_R = (token_R < q_start_S[1:].long()).view(-1, 1, 1, 1)
        of_row = [
            x.index_select(0, token_R.clamp(max=num_tokens - 1))
            for x in (k_TVH, v_TVI, beta_TV, log_decay_TV)
        ]
        after_RVHI = reference.gated_delta.next_state(state_RVHI, *of_row)
        state_RVHI = torch.where(is_fed_R, after_RVHI, state_RVHI)
        states.append(state_RVHI)
    at_T = idx_T.clamp(max=len(states) - 1) * num_rows + row_T
    after_TVHI = torch.cat(states).index_select(0, at_T)
    o_TVI = (after_TVHI * q_TVH.unsqueeze(3)).sum(2)
    return torch.where(is_real_T.view(-1, 1, 1), o_TVI, 0).to(qkv_TC.dtype), after_TVHI


def in_chunks(
    qkv_TC: Tensor,
    ba_TJ: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    num_chunks: int,
) -> tuple[Tensor, Tensor]:
    """The results and the rows' last states, in `num_chunks` chunks: enough for all rows."""
    num_tokens = len(qkv_TC)
    of = chunks(q_start_S, num_tokens, num_chunks)
    q, k, v = (of.of(x) for x in heads(qkv_TC, state_XVHI))
    beta_ZVL, log_decay_ZVL = (of.of(x) for x in gates(ba_TJ, a_log_V, dt_bias_V))
    # the decay from before the chunk to after token i, and that from after token j to after token i
    total_ZVL = log_decay_ZVL.cumsum(2)
    idx_L = torch.arange(CHUNK, device=qkv_TC.device)
    is_before_LL = idx_L.unsqueeze(1) >= idx_L
    between_ZVLL = total_ZVL.unsqueeze(3) - total_ZVL.unsqueeze(2)
    between_ZVLL = torch.where(is_before_LL, between_ZVLL, -torch.inf).exp()
    since_ZVL1, until_ZVL1 = (
        x.exp().unsqueeze(3) for x in (total_ZVL, total_ZVL[..., -1:] - total_ZVL)
    )
    beta_k, keys = k * beta_ZVL.unsqueeze(3), k.transpose(2, 3)
    below_ZVLL = torch.where(idx_L.unsqueeze(1) > idx_L, (beta_k @ keys) * between_ZVLL, 0)
    inverse = inverse_of_unit_lower(below_ZVLL)
    written, read = inverse @ (v * beta_ZVL.unsqueeze(3)), inverse @ (beta_k * since_ZVL1)
    scores = (q @ keys) * between_ZVLL
    q, k = q * since_ZVL1, (k * until_ZVL1).transpose(2, 3)
    start_RVHI = reference.gated_delta.start_states(state_XVHI, from_R, is_new_R)
    chunk_Z = torch.arange(num_chunks, device=qkv_TC.device)
    is_first_Z = chunk_Z == of.first_R.index_select(0, of.row_Z)
    state_VHI = torch.zeros_like(start_RVHI[0])
    results, states = [], []
    for z in range(num_chunks):
        start_VHI = start_RVHI.index_select(0, of.row_Z[z : z + 1])[0]
        state_VHI = torch.where(is_first_Z[z : z + 1].view(1, 1, 1), start_VHI, state_VHI)
        value_VLI = written[z] - read[z] @ state_VHI
        results.append(q[z] @ state_VHI + scores[z] @ value_VLI)
        state_VHI = state_VHI * since_ZVL1[z, :, -1:] + k[z] @ value_VLI
        states.append(state_VHI)
    last_R = (of.end_R - 1).clamp(0, num_chunks - 1)
    out_TVI = of.joined(torch.stack(results), q_start_S, num_tokens).to(qkv_TC.dtype)
    return out_TVI, torch.stack(states).index_select(0, last_R)
