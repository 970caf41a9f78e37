"""How weights are stored and multiplied: one file per format.

`format.py` says what a format provides, `schemes.py` which parameters have which. The functions
here are for regions, and take weights in any format.
T tokens | K experts per token | E experts | O outputs | D depth | F expert width | G = 2F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.formats.format import Stored
from nanovllm.models.formats.format import Weight as Weight


def linear(
    x_TD: Tensor, weight: Weight, bias_O: Tensor | None, residual_TO: Tensor | None = None
) -> Tensor:
    """x · weightᵀ + bias + residual: [T, O] in the dtype of x."""
    if isinstance(weight, Tensor):
        return ops.linear(x_TD, weight, bias_O, residual_TO)
    return cast(Stored, weight).linear(x_TD, bias_O, residual_TO)


def lookup(weight: Weight, row_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table, by their numbers: [T, D] in `dtype`, the model's."""
    if isinstance(weight, Tensor):
        return torch.nn.functional.embedding(row_T, weight)
    return cast(Stored, weight).lookup(row_T, dtype)


def own_lookup(weight: Weight, token_T: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """`lookup` in this rank's part of a table, `num_rows` of its rows; zeros for tokens of other
    ranks: see `collectives.shard_embedding`."""
    if isinstance(weight, Tensor):
        return ops.shard_embedding(token_T, weight)
    # the op knows the rank: it gives a token's place here plus 1, or 0
    place_W1 = torch.arange(1, num_rows + 1, device=token_T.device).unsqueeze(1)
    place_T = ops.shard_embedding(token_T, place_W1).squeeze(1)
    return lookup(weight, (place_T - 1).clamp(min=0), dtype) * (place_T > 0).unsqueeze(1)


def rows(weight: Weight, first: int) -> Tensor:
    """The real values of the weight's rows from `first` on, in fp32."""
    if isinstance(weight, Tensor):
        return weight[first:].float()
    return cast(Stored, weight).rows(first)


def expert_linear(x: Tensor, expert_TK: Tensor, weight: Weight) -> Tensor:
    """See `reference.experts.expert_linear`: x is [T, D] or [T, K, D], the result [T, K, O]."""
    if isinstance(weight, Tensor):
        return ops.expert_linear(x, expert_TK, weight)
    return cast(Stored, weight).expert_linear(x, expert_TK)


def experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up: Weight,
    down: Weight,
    residual_TD: Tensor | None,
    local_X: Tensor | None = None,
) -> Tensor:
    """The experts' weighted sum for each token, plus the residual: see
    `reference.experts.experts`.

    A format whose weights have `experts` may compute it as one op, if both matrices are its own.
    """
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        rest = () if local_X is None else (local_X,)
        return ops.experts(x_TD, weight_TK, expert_TK, gate_up, down, residual_TD, *rest)
    whole: Any = getattr(gate_up, "experts", None)
    if whole is not None and type(gate_up) is type(down):
        result: Tensor | None = whole(x_TD, weight_TK, expert_TK, down, residual_TD, local_X)
        if result is not None:
            return result
    matrices = (gate_up, down)
    return experts_by_products(
        ops.silu_mul, x_TD, weight_TK, expert_TK, matrices, residual_TD, local_X
    )


def experts_by_products(
    activation: Callable[[Tensor], Tensor],
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    matrices: tuple[Weight, Weight],
    residual_TD: Tensor | None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`experts` as two products, with any activation of gate and up, [.., G] to [.., F], between
    them."""
    gate_up, down = matrices
    if local_X is not None:
        expert_TK = local_X[expert_TK.long()]
    own_TK = expert_TK.clamp(min=0)
    inner_TKF = activation(expert_linear(x_TD, own_TK, gate_up))
    y_TKD = expert_linear(inner_TKF, own_TK, down).float() * weight_TK.unsqueeze(-1)
    if local_X is not None:
        y_TKD = y_TKD.masked_fill((expert_TK < 0).unsqueeze(-1), 0.0)
    y_TD = y_TKD.sum(1).to(x_TD.dtype)
    return y_TD if residual_TD is None else residual_TD + y_TD
