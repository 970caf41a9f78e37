"""Compressed experts: the experts of a layer share a basis for each kind of matrix.

A matrix [O, I] of expert e is Uᵀ and V_eᵀ, [L, I] and [O, L]: x · Wᵀ ≈ (x · U) · V_e. The product
with a basis of gate or up is computed once for a token, whichever experts it goes to.

T tokens | K experts per token | E experts | D hidden | F expert width | L rank of the bases
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops


class Compressed(NamedTuple):
    """The transposed bases, and the transposed matrices of each expert."""

    u_gate_LD: Tensor
    u_up_LD: Tensor
    u_down_LF: Tensor
    v_gate_EFL: Tensor
    v_up_EFL: Tensor
    v_down_EDL: Tensor


Stored = Compressed


def apply(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    stored: Compressed,
    residual_TD: Tensor | None,
) -> Tensor:
    """The sum over experts is in fp32 and is rounded once, as in `reference.experts.experts`."""
    gate_TL, up_TL = (ops.linear(x_TD, u, None) for u in (stored.u_gate_LD, stored.u_up_LD))
    gate_TKF = ops.expert_linear(gate_TL, expert_TK, stored.v_gate_EFL)
    up_TKF = ops.expert_linear(up_TL, expert_TK, stored.v_up_EFL)
    inner_PF = ops.silu_mul(torch.cat((gate_TKF, up_TKF), dim=-1)).flatten(0, 1)
    down_TKL = ops.linear(inner_PF, stored.u_down_LF, None).view(*expert_TK.shape, -1)
    y_TKD = ops.expert_linear(down_TKL, expert_TK, stored.v_down_EDL)
    y_TD = (y_TKD.float() * weight_TK.unsqueeze(-1)).sum(1).to(x_TD.dtype)
    return y_TD if residual_TD is None else residual_TD + y_TD
