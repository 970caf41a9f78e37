"""Mixture of experts: which experts a token goes to, and the sum of their results.

Shapes: see the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm.kernels.reference.linear import linear
from nanovllm.kernels.reference.norm_act import gelu_mul, rms_norm, silu_mul


def topk_softmax(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` likeliest experts of each token.

    Returns (weight_TK fp32, expert_TK int32): probabilities in softmax(logits), and experts, the
    likeliest first. Among equal probabilities the smaller id comes first. With `normalize` a
    token's weights are divided by their sum. A row that holds NaN gets NaN weights and valid ids.
    """
    prob_TE = logits_TE.float().softmax(-1)
    sorted_TE, order_TE = prob_TE.sort(dim=-1, descending=True, stable=True)
    weight_TK, expert_TK = sorted_TE[:, :top_k], order_TE[:, :top_k]
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return weight_TK.contiguous(), expert_TK.int()


def group_topk(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    num_groups: int,
    top_groups: int,
    group_scores: int,
    sigmoid: bool,
    normalize: bool,
    smallest_sum: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` experts with the largest score + bias, from the best groups of experts.

    Scores are sigmoid(logits), or softmax(logits) without `sigmoid`. Experts are in `num_groups`
    groups of neighbours. A group is worth the sum of its `group_scores` largest numbers
    (score + bias), and experts are chosen from the `top_groups` best ones. Returns (weight_TK fp32,
    expert_TK int32): scores without the bias, times `scale`; with `normalize` they are first
    divided by their sum, or by `smallest_sum` if this is larger. The best expert comes first, and
    the smaller id among equals. A row that holds NaN gets NaN weights and valid ids.

    Source: DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, section 2.1.2.
    """
    logits_TE = logits_TE.float()
    score_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    choice_TE = score_TE if bias_E is None else score_TE + bias_E.float()
    if top_groups < num_groups:
        choice_TGe = choice_TE.unflatten(-1, (num_groups, -1))
        worth_TG = choice_TGe.topk(group_scores, dim=-1).values.sum(-1)
        order_TG = worth_TG.sort(dim=-1, descending=True, stable=True).indices
        is_out_TG = torch.ones_like(worth_TG).scatter(1, order_TG[:, :top_groups], 0.0) > 0
        choice_TE = choice_TGe.masked_fill(is_out_TG.unsqueeze(-1), -torch.inf).flatten(1)
    expert_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weight_TK = score_TE.gather(1, expert_TK)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=smallest_sum)
    weight_TK = weight_TK.masked_fill(logits_TE.isnan().any(-1, keepdim=True), torch.nan)
    return (weight_TK * scale).contiguous(), expert_TK.int()


def norm_router_topk(
    x_TD: Tensor,
    norm_D: Tensor,
    router_ED: Tensor,
    eps: float,
    top_k: int,
    normalize: bool,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = rms_norm(x); returns (y, *topk_softmax(y · routerᵀ + bias))."""
    normed_TD = rms_norm(x_TD, norm_D, eps)
    return normed_TD, *topk_softmax(linear(normed_TD, router_ED, bias_E), top_k, normalize)


def experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """Σ_k weight[t, k] · down_e(silu(gate_e(x_t)) · up_e(x_t)) with e = expert[t, k], + residual.

    gate_up_EGD holds gate's rows of each expert, then up's. The sum over k is in fp32 and is
    rounded to x's dtype once, before the residual is added. No token is dropped, and the weights of
    experts that no token chooses are not read.

    With local_X, int32, the E matrices are those of some of X experts: expert e has the matrices
    local_X[e], and is left out of the sum where that is negative, whatever its weight is.
    """
    return _by_activation(
        silu_mul, x_TD, weight_TK, expert_TK, (gate_up_EGD, down_EDF), residual_TD, local_X
    )


def gelu_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`experts` with `norm_act.gelu_mul` in place of SiLU."""
    return _by_activation(
        gelu_mul, x_TD, weight_TK, expert_TK, (gate_up_EGD, down_EDF), residual_TD, local_X
    )


def _by_activation(
    activation: Callable[[Tensor], Tensor],
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    matrices: tuple[Tensor, Tensor],
    residual_TD: Tensor | None,
    local_X: Tensor | None,
) -> Tensor:
    gate_up_EGD, down_EDF = matrices
    if local_X is not None:
        expert_TK = local_X[expert_TK.long()]
    inner_TKF = activation(expert_linear(x_TD, expert_TK, gate_up_EGD))
    y_TKD = _expert_products(inner_TKF.flatten(0, 1), expert_TK.flatten(), down_EDF)
    y_TKD = y_TKD.view(*expert_TK.shape, -1) * weight_TK.unsqueeze(-1)
    if local_X is not None:
        y_TKD = y_TKD.masked_fill((expert_TK < 0).unsqueeze(-1), 0.0)
    y_TD = y_TKD.sum(1).to(x_TD.dtype)
    return y_TD if residual_TD is None else y_TD + residual_TD


def expert_linear(x: Tensor, expert_TK: Tensor, weight_EOD: Tensor) -> Tensor:
    """x times the transposed matrix of each of its token's experts: [T, K, O].

    x is [T, D], one row for each token, or [T, K, D], one for each of its experts.
    """
    num_chosen = expert_TK.shape[1]
    x_PD = x.repeat_interleave(num_chosen, 0) if x.dim() == 2 else x.flatten(0, 1)
    y_PO = _expert_products(x_PD, expert_TK.flatten(), weight_EOD)
    return y_PO.to(x.dtype).view(*expert_TK.shape, -1)


def _expert_products(x_PD: Tensor, expert_P: Tensor, weight_EOD: Tensor) -> Tensor:
    """Row p of x times the transposed matrix of expert p, in fp32; zeros for negative experts."""
    y_PO = x_PD.new_zeros((x_PD.shape[0], weight_EOD.shape[1]), dtype=torch.float32)
    for expert in expert_P[expert_P >= 0].unique().tolist():
        p = (expert_P == expert).nonzero().squeeze(1)
        y_PO[p] = x_PD[p].float() @ weight_EOD[expert].float().t()
    return y_PO
