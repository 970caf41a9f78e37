"""Low-rank changes of linear layers: LoRA (arXiv 2106.09685), another one for each row.

T tokens | D depth | O outputs | N slots for adapters | P parts of the outputs | R rank | L = P · R
F = O / 2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.reference import linear, norm_act


def add_lora(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    sorted_T: Tensor,
    order_T: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: list[int],
    residual_TO: Tensor | None = None,
) -> Tensor:
    """y[t] + b[n] · (a[n] · x[t]) with n = adapter[t] − 1, or y[t] if adapter[t] is 0; then
    + residual.

    The outputs are parts of `rows[p]` rows, whose inner values are numbers p · R … p · R + R − 1 of
    the L: q, k and v of a packed projection have an `a` each. Sums are in fp32; the inner values
    are rounded to the dtype of x, and the result to that of y. `order_T` has the tokens in an order
    in which those of an adapter follow each other, and `sorted_T` their adapters: kernels may read
    them. The numbers in slots that no token uses must be finite.
    """
    num_slots, rank = a_NLD.shape[0], b_NOR.shape[2]
    # the product with the matrices of all slots: its shape does not depend on the tokens' adapters
    z_TNL = (x_TD.float() @ a_NLD.flatten(0, 1).float().t()).view(-1, *a_NLD.shape[:2])
    own_TN = adapter_T.unsqueeze(1) == torch.arange(1, num_slots + 1, device=adapter_T.device)
    z_TNL = torch.where(own_TN.unsqueeze(2), z_TNL.to(x_TD.dtype).float(), 0.0)
    parts = zip(z_TNL.split(rank, dim=2), b_NOR.split(rows, dim=1))
    added = [
        z_TNR.flatten(1) @ b_NPR.transpose(1, 2).flatten(0, 1).float() for z_TNR, b_NPR in parts
    ]
    y_TO = (y_TO.float() + torch.cat(added, dim=1)).to(y_TO.dtype)
    return y_TO if residual_TO is None else y_TO + residual_TO


def add_lora_(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    sorted_T: Tensor,
    order_T: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: list[int],
) -> None:
    """`add_lora` in the memory of y."""
    y_TO.copy_(add_lora(y_TO, x_TD, adapter_T, sorted_T, order_T, a_NLD, b_NOR, rows))


def add_lora_silu(y_TO: Tensor, *rest: Any) -> Tensor:
    """silu(gate) · up, [T, F], of what `add_lora` gives without a residual: [gate | up]."""
    return norm_act.silu_mul(add_lora(y_TO, *rest))


def lora_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu_mul: bool,
    *rest: Any,
) -> Tensor:
    """`fused_linear` whose product has what adapters add. `rest` are the arguments of `add_lora`
    after x."""
    if norm_weight_D is not None:
        x_TD = norm_act.rms_norm(x_TD, norm_weight_D, eps)
    y_TO = add_lora(linear.linear(x_TD, weight_OD, bias_O), x_TD, *rest)
    y_TO = norm_act.silu_mul(y_TO) if silu_mul else y_TO
    return y_TO if residual_TO is None else y_TO + residual_TO
