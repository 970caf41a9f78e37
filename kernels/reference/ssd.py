"""The recurrence of Mamba-2 (state space duality). Layers keep a state of each row.

Shapes: T tokens | R rows | X places of states | V heads | I head size | H state size | G groups of
V / G heads | C = V·I + 2·G·H channels, which are [x | B | C]

Rows, their places, padding, and to_R and to_T are those of `gated_delta`.

Source: Dao and Gu 2024, Transformers are SSMs, https://arxiv.org/abs/2405.21060.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.reference.gated_delta import owners, start_states
from nanovllm.kernels.reference.step import store_state


def parts(xbc_TC: Tensor, dt_TV: Tensor, state_XVHI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dt · x [T, V, I], and B and C [T, G, H]; fp32."""
    _, num_heads, state_size, head_size = state_XVHI.shape
    num_values = num_heads * head_size
    num_of_groups = (xbc_TC.shape[1] - num_values) // 2
    x, b, c = xbc_TC.float().split([num_values, num_of_groups, num_of_groups], dim=1)
    x_TVI = x.reshape(-1, num_heads, head_size) * dt_TV.unsqueeze(2)
    b_TGH, c_TGH = (one.reshape(len(xbc_TC), -1, state_size) for one in (b, c))
    return x_TVI, b_TGH, c_TGH


def of_heads(x_TGH: Tensor, num_heads: int) -> Tensor:
    """[T, V, H] of numbers of groups, whose heads are neighbours."""
    num_tokens, num_groups, state_size = x_TGH.shape
    shape = (num_tokens, num_groups, num_heads // num_groups, state_size)
    return x_TGH.unsqueeze(2).expand(shape).reshape(num_tokens, num_heads, state_size)


def inputs(xbc_TC: Tensor, dt_TV: Tensor, state_XVHI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`parts` with B and C of each head: [T, V, H]."""
    x_TVI, b_TGH, c_TGH = parts(xbc_TC, dt_TV, state_XVHI)
    num_heads = x_TVI.shape[1]
    return x_TVI, of_heads(b_TGH, num_heads), of_heads(c_TGH, num_heads)


def next_state(state_RVHI: Tensor, x_RVI: Tensor, b_RVH: Tensor, log_decay_RV: Tensor) -> Tensor:
    """The states after one token of each row: S' = α·S + B ⊗ dt·x."""
    decayed_RVHI = state_RVHI * log_decay_RV.exp()[:, :, None, None]
    return decayed_RVHI + b_RVH.unsqueeze(3) * x_RVI.unsqueeze(2)


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
    """The recurrence over the tokens of all rows, one by one: y = S'ᵀ C, see `next_state`;
    [T, V, I] in fp32. Updates the states in place.

    xbc are the results of `causal_conv`; dt and log α are in fp32. Rows that are new begin with
    zeros. With to_T no row may have more than ⌈T / R⌉ tokens. All is computed in fp32, and rounded
    to the state's dtype once at the end.
    """
    x_TVI, b_TVH, c_TVH = inputs(xbc_TC, dt_TV, state_XVHI)
    row_T, _, is_real_T = owners(q_start_S, len(xbc_TC))
    state_RVHI = start_states(state_XVHI, from_R, is_new_R)
    results, states = [], []
    for token in range(len(xbc_TC)):
        one = slice(token, token + 1)
        row_1, is_real_1 = row_T[one], is_real_T[one].view(-1, 1, 1, 1)
        before = state_RVHI.index_select(0, row_1)
        after = next_state(before, x_TVI[one], b_TVH[one], log_decay_TV[one])
        after = torch.where(is_real_1, after, before)
        state_RVHI = state_RVHI.index_copy(0, row_1, after)
        states.append(after)
        y = (after * c_TVH[one].unsqueeze(3)).sum(2)
        results.append(torch.where(is_real_1[:, 0], y, 0))
    if to_T is not None:
        store_state(torch.cat(states), state_XVHI, to_T)
    else:
        assert to_R is not None
        store_state(state_RVHI, state_XVHI, to_R)
    return torch.cat(results)


def stepped(
    xbc_RC: Tensor,
    dt_RV: Tensor,
    log_decay_RV: Tensor,
    state_XVHI: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """The results of `ssd_step`, and the state of each row after it."""
    x_RVI, b_RVH, c_RVH = inputs(xbc_RC, dt_RV, state_XVHI)
    start_RVHI = start_states(state_XVHI, from_R, is_new_R)
    after_RVHI = next_state(start_RVHI, x_RVI, b_RVH, log_decay_RV)
    return (after_RVHI * c_RVH.unsqueeze(3)).sum(2), after_RVHI


def ssd_step(
    xbc_RC: Tensor,
    dt_RV: Tensor,
    log_decay_RV: Tensor,
    state_XVHI: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor,
) -> Tensor:
    """`ssd` for one token of each row: [R, V, I] in fp32. Updates the states in place, and reads
    and writes each once."""
    y_RVI, after_RVHI = stepped(xbc_RC, dt_RV, log_decay_RV, state_XVHI, from_R, is_new_R)
    store_state(after_RVHI, state_XVHI, to_R)
    return y_RVI
