"""Low-rank changes of linear layers: LoRA (arXiv 2106.09685), another one for each row.

T tokens | D depth | O outputs | N slots for adapters | P parts of the outputs | R rank | L = P · R
F = O / 2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.reference import linear, norm_act

TOKENS = 16  # of a tile: the smallest of the matrix units
# Of a tile, of more than FEW tokens. With 64, Triton multiplies by warpgroups, which was wrong for
# operands of 16 (docs/log.md, gated delta rule).
MANY_TOKENS, FEW = 32, 512


def tile_tokens(num_tokens: int) -> int:
    """The most tokens of a tile, where there are so many in all."""
    return TOKENS if num_tokens <= FEW else MANY_TOKENS


def max_tiles(num_tokens: int, num_slots: int) -> int:
    """The most tiles that tokens can have."""
    size, num = tile_tokens(num_tokens), min(num_slots + 1, num_tokens)
    return (num_tokens + (size - 1) * num) // size


def adapter_tiles(adapter_T: Tensor) -> tuple[Tensor, Tensor]:
    """Groups tokens by their adapters.

    Returns their order, in which the tokens of an adapter follow each other, and tiles [T, 3] in
    int32: where a tile begins in that order, where it ends, and its adapter. A tile has up to
    `tile_tokens` tokens of one adapter; after the last tile there are zeros.
    """
    num = adapter_T.shape[0]
    if num == 1:
        ends_12 = torch.arange(2, device=adapter_T.device)
        return torch.zeros_like(adapter_T), torch.cat((ends_12, adapter_T)).int().unsqueeze(0)
    size = tile_tokens(num)
    sorted_T, order_T = adapter_T.sort(stable=True)
    i_T = torch.arange(num, device=adapter_T.device)
    begins_T = (i_T - torch.searchsorted(sorted_T, sorted_T)) % size == 0
    begin_T = torch.searchsorted(begins_T.cumsum(0), i_T + 1)  # of each tile; `num` for none
    at_T = begin_T.clamp(max=num - 1)
    sorted_end_T = torch.searchsorted(sorted_T, sorted_T, right=True)
    end_T = torch.minimum(at_T + size, sorted_end_T.index_select(0, at_T))
    tile_T3 = torch.stack((at_T, end_T, sorted_T.index_select(0, at_T)), dim=1)
    return order_T, torch.where((begin_T < num).unsqueeze(1), tile_T3, 0).int()


def add_lora(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    order_T: Tensor,
    tile_T3: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: list[int],
    residual_TO: Tensor | None = None,
) -> Tensor:
    """y[t] + b[n] · (a[n] · x[t]) with n = adapter[t] − 1, or y[t] if adapter[t] is 0; then
    + residual.

    The outputs are parts of `rows[p]` rows, whose inner values are numbers p · R … p · R + R − 1 of
    the L: q, k and v of a packed projection have an `a` each. Sums are in fp32; the inner values
    are rounded to the dtype of x, and the result to that of y. Kernels may read `order_T` and
    `tile_T3`, of `adapter_tiles`. The numbers in slots that no token uses must be finite.
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
    order_T: Tensor,
    tile_T3: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: list[int],
) -> None:
    """`add_lora` in the memory of y."""
    y_TO.copy_(add_lora(y_TO, x_TD, adapter_T, order_T, tile_T3, a_NLD, b_NOR, rows))


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
