"""The gated delta rule, and the short convolution before it. Layers keep a state of each row.

Shapes: T tokens | R rows | X places of states | W taps | G key heads | V value heads, V / G of each
key head | H key size | I value size | C = 2·G·H + V·I channels, which are [q | k | v] | J = 2·V

Row r owns tokens q_start[r] .. q_start[r + 1] − 1, and its state before them is at place from_R[r].
The state after its last token goes to place to_R[r]; if to_T is given instead, the state after
token t goes to to_T[t]. Tokens after those of the last row are padding: their results are zeros,
and with to_T their states are undefined.

Source: Yang, Kautz and Hatamizadeh 2024, Gated Delta Networks, https://arxiv.org/abs/2412.06464.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from nanovllm.kernels.reference.norm_act import rms_norm
from nanovllm.kernels.reference.step import store_state

NORM_EPS = 1e-6  # of the lengths of queries and keys


class Owners(NamedTuple):
    """Each token's row and its number within the row, and which tokens belong to a row."""

    row_T: Tensor
    idx_T: Tensor
    is_real_T: Tensor


def owners(q_start_S: Tensor, num_tokens: int) -> Owners:
    token_T = torch.arange(num_tokens, device=q_start_S.device)
    end_R = q_start_S[1:].long()
    row_T = (token_T.unsqueeze(1) >= end_R).sum(1).clamp(max=len(end_R) - 1)
    idx_T = token_T - q_start_S.long().index_select(0, row_T)
    return Owners(row_T, idx_T, token_T < end_R[-1:])


def convolved(
    x_TC: Tensor,
    weight_CW: Tensor,
    state_XWC: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
    bias_C: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `causal_conv`, states [N, W, C], and the places [N] where they go."""
    num_taps = weight_CW.shape[1]
    row_T, idx_T, is_real_T = owners(q_start_S, len(x_TC))
    num_R = q_start_S[1:] - q_start_S[:-1]
    pos_T = (seq_len_R - num_R).long().index_select(0, row_T) + idx_T
    token_T = torch.arange(len(x_TC), device=x_TC.device)
    states = state_XWC.flatten(0, 1)
    first_T = from_R.index_select(0, row_T) * num_taps
    taps = []
    total_TC = torch.zeros_like(x_TC, dtype=torch.float32)
    if bias_C is not None:
        total_TC = total_TC + bias_C.float()
    for shift in range(num_taps):
        own_TC = x_TC.index_select(0, (token_T - shift).clamp(min=0))
        kept_TC = states.index_select(0, first_T + (pos_T - shift) % num_taps).to(x_TC.dtype)
        tap_TC = torch.where((idx_T >= shift).unsqueeze(1), own_TC, kept_TC)
        taps.append(torch.where((pos_T >= shift).unsqueeze(1), tap_TC, 0))
        total_TC = total_TC + taps[-1].float() * weight_CW[:, num_taps - 1 - shift].float()
    taps_TWC = torch.stack(taps, 1)  # number s is the input s positions before the token
    y_TC = torch.where(is_real_T.unsqueeze(1), silu(total_TC.to(x_TC.dtype)), 0)
    if to_T is None:
        last_R = (q_start_S[1:].long() - 1).clamp(min=0)
        taps_TWC, pos_T = taps_TWC.index_select(0, last_R), pos_T.index_select(0, last_R)
        to_T = to_R
    assert to_T is not None
    index_W = torch.arange(num_taps, device=x_TC.device)
    shift_TW1 = ((pos_T.unsqueeze(1) - index_W) % num_taps).unsqueeze(2)
    return y_TC, taps_TWC.gather(1, shift_TW1.expand_as(taps_TWC)), to_T


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    state_XWC: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
    bias_C: Tensor | None = None,
) -> Tensor:
    """silu(bias + Σ_s weight[:, W − 1 − s] · x(p − s)) for each token, where x(p) is the input at
    position p of its row, 0 before position 0; [T, C] in x's dtype. Updates the states in place.

    A state has the newest W inputs: that of position p at index p % W, so that one token replaces
    one input. seq_len_R are the rows' tokens with those of this step, q_start_S the first token of
    each row. Sums are in fp32; they are rounded to x's dtype before silu.
    """
    y_TC, after_NWC, to_N = convolved(
        x_TC, weight_CW, state_XWC, seq_len_R, q_start_S, from_R, to_R, to_T, bias_C
    )
    store_state(after_NWC, state_XWC, to_N)
    return y_TC


def gates(ba_TJ: Tensor, a_log_V: Tensor, dt_bias_V: Tensor) -> tuple[Tensor, Tensor]:
    """(β, log α) [T, V] in fp32 of [b | a]: β = sigmoid(b) is how much of a key's value is
    replaced, and the state decays by α = exp(−exp(a_log) · softplus(a + dt_bias))."""
    b_TV, a_TV = ba_TJ.float().chunk(2, dim=-1)
    a_TV = a_TV + dt_bias_V.float()
    rate_TV = a_TV.clamp(min=0) + torch.log1p((-a_TV.abs()).exp())  # softplus
    return torch.sigmoid(b_TV), -a_log_V.float().exp() * rate_TV


def heads(qkv_TC: Tensor, state_XVHI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [T, V, H] of length 1, and 1 / √H for queries, and values [T, V, I]; fp32.

    The value heads of a key head are neighbours.
    """
    _, num_v, key_size, value_size = state_XVHI.shape
    num_keys = (qkv_TC.shape[1] - num_v * value_size) // 2
    q, k, v = qkv_TC.float().split([num_keys, num_keys, num_v * value_size], dim=1)
    q_TGH, k_TGH = (x.view(len(x), -1, key_size) for x in (q, k))
    q_TGH, k_TGH = (
        x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (q_TGH, k_TGH)
    )
    shape = (*q_TGH.shape[:2], num_v // q_TGH.shape[1], key_size)
    q_TVH, k_TVH = (
        x.unsqueeze(2).expand(shape).reshape(-1, num_v, key_size)
        for x in (q_TGH * key_size**-0.5, k_TGH)
    )
    return q_TVH, k_TVH, v.reshape(-1, num_v, value_size)


def next_state(
    state_RVHI: Tensor, k_RVH: Tensor, v_RVI: Tensor, beta_RV: Tensor, log_decay_RV: Tensor
) -> Tensor:
    """The states after one token of each row: S' = α·S + k ⊗ β·(v − (α·S)ᵀ k)."""
    state_RVHI = state_RVHI * log_decay_RV.exp()[:, :, None, None]
    read_RVI = (state_RVHI * k_RVH.unsqueeze(3)).sum(2)
    delta_RVI = (v_RVI - read_RVI) * beta_RV.unsqueeze(2)
    return state_RVHI + k_RVH.unsqueeze(3) * delta_RVI.unsqueeze(2)


def start_states(state_XVHI: Tensor, from_R: Tensor, is_new_R: Tensor) -> Tensor:
    """The states before a step in fp32: zeros for new rows, whatever is stored."""
    stored_RVHI = state_XVHI.index_select(0, from_R).float()
    return torch.where(is_new_R.view(-1, 1, 1, 1), 0, stored_RVHI)


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
    """The gated delta rule over the tokens of all rows, one by one: o = S'ᵀ q, see `next_state`;
    [T, V, I] in qkv's dtype. Updates the states in place.

    qkv are the results of `causal_conv`, see `heads`; ba gives `gates`. Rows that are new begin
    with zeros. With to_T no row may have more than ⌈T / R⌉ tokens. All is computed in fp32, and
    rounded to the state's dtype once at the end: states between tokens of one step are not rounded.
    """
    q_TVH, k_TVH, v_TVI = heads(qkv_TC, state_XVHI)
    beta_TV, log_decay_TV = gates(ba_TJ, a_log_V, dt_bias_V)
    row_T, _, is_real_T = owners(q_start_S, len(qkv_TC))
    state_RVHI = start_states(state_XVHI, from_R, is_new_R)
    results, states = [], []
    for token in range(len(qkv_TC)):
        one = slice(token, token + 1)
        row_1, is_real_1 = row_T[one], is_real_T[one].view(-1, 1, 1, 1)
        before = state_RVHI.index_select(0, row_1)
        after = next_state(before, k_TVH[one], v_TVI[one], beta_TV[one], log_decay_TV[one])
        after = torch.where(is_real_1, after, before)
        state_RVHI = state_RVHI.index_copy(0, row_1, after)
        states.append(after)
        o = (after * q_TVH[one].unsqueeze(3)).sum(2)
        results.append(torch.where(is_real_1[:, 0], o, 0))
    if to_T is not None:
        store_state(torch.cat(states), state_XVHI, to_T)
    else:
        assert to_R is not None
        store_state(state_RVHI, state_XVHI, to_R)
    return torch.cat(results).to(qkv_TC.dtype)


def gated_norm(o_TVI: Tensor, z_TP: Tensor, norm_I: Tensor, eps: float) -> Tensor:
    """rms_norm(o) · silu(z) with silu in fp32; [T, P] for z [T, P], P = V·I."""
    normed_TP = rms_norm(o_TVI, norm_I, eps).flatten(1)
    return (normed_TP.float() * silu(z_TP.float())).to(o_TVI.dtype)


def stepped(
    qkv_RC: Tensor,
    z_RP: Tensor,
    ba_RJ: Tensor,
    conv_CW: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    norm_I: Tensor,
    eps: float,
    conv_state_XWC: Tensor,
    state_XVHI: Tensor,
    seq_len_R: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `gated_delta_step`, and both states of each row after it."""
    q_start_S = torch.arange(len(qkv_RC) + 1, device=qkv_RC.device)
    mixed_RC, conv_RWC, _ = convolved(
        qkv_RC, conv_CW, conv_state_XWC, seq_len_R, q_start_S, from_R, to_R
    )
    q_RVH, k_RVH, v_RVI = heads(mixed_RC, state_XVHI)
    beta_RV, log_decay_RV = gates(ba_RJ, a_log_V, dt_bias_V)
    start_RVHI = start_states(state_XVHI, from_R, is_new_R)
    after_RVHI = next_state(start_RVHI, k_RVH, v_RVI, beta_RV, log_decay_RV)
    o_RVI = (after_RVHI * q_RVH.unsqueeze(3)).sum(2).to(qkv_RC.dtype)
    return gated_norm(o_RVI, z_RP, norm_I, eps), conv_RWC, after_RVHI


def gated_delta_step(
    qkv_RC: Tensor,
    z_RP: Tensor,
    ba_RJ: Tensor,
    conv_CW: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    norm_I: Tensor,
    eps: float,
    conv_state_XWC: Tensor,
    state_XVHI: Tensor,
    seq_len_R: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor,
) -> Tensor:
    """`causal_conv`, `gated_delta` and `gated_norm` for one token of each row: [R, P]. Updates both
    states in place, and reads and writes each once."""
    y_RP, conv_RWC, after_RVHI = stepped(
        qkv_RC, z_RP, ba_RJ, conv_CW, a_log_V, dt_bias_V, norm_I, eps, conv_state_XWC, state_XVHI,
        seq_len_R, from_R, is_new_R, to_R,
    )  # fmt: skip
    store_state(conv_RWC, conv_state_XWC, to_R)
    store_state(after_RVHI, state_XVHI, to_R)
    return y_RP
