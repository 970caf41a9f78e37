"""Mixtures of experts as Ascend's fused ops: choice, sort by expert, grouped products, sum.

All shapes are static and nothing is read by the host, so the same functions run op by op, captured
and in graphs of GE. Every token reaches its K experts: there is no capacity and no padding.

Shapes: T tokens | K experts per token | P = T·K pairs of a token and an expert | E experts | X
experts, with those elsewhere | D hidden | F expert width | G = 2F | N, O columns of a matrix
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanovllm.kernels.reference.clamped import Product, by_products

# By their documentation: moe_gating_top_k_softmax takes up to this many experts per token,
# grouped_matmul up to this many groups, and rows of matrices below this size.
MAX_TOP_K, MAX_EXPERTS, ROW_LIMIT = 1024, 1024, 65536
# grouped_matmul: the groups are rows of x, given by the size of each; the result is one tensor
BY_ROWS, SIZES, ONE_RESULT = 0, 1, 2
# moe_init_routing_v2 counts the pairs of each expert. For moe_finalize_routing the pairs of a token
# are adjacent in the index, and no pair was dropped.
COUNTS, TOKEN_MAJOR = 1, 2


def check_experts(num_experts: int, top_k: int, *row_sizes: int) -> None:
    """ValueError for what Ascend's ops do not take."""
    if not 1 < num_experts <= MAX_EXPERTS:
        raise ValueError(
            f"the model has {num_experts} experts: on an NPU a layer has 2 to {MAX_EXPERTS}"
        )
    if not 0 < top_k <= min(num_experts, MAX_TOP_K):
        raise ValueError(
            f"the model sends each token to {top_k} of {num_experts} experts: on an NPU it must be "
            f"1 to {min(num_experts, MAX_TOP_K)}"
        )
    if row_sizes and max(row_sizes) >= ROW_LIMIT:
        raise ValueError(
            f"the model's experts have rows of {max(row_sizes)} elements: on an NPU they must be "
            f"below {ROW_LIMIT}"
        )


def topk_softmax(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """`reference.experts.topk_softmax`. Ascend's op returns weights in the dtype of its input, and
    does not divide them by their sum.

    What it does with NaN is not documented. A wrong expert would change other tokens' results, so a
    row that holds NaN or infinity is routed as zeros, and its weights are NaN.
    """
    check_experts(logits_TE.shape[1], top_k)
    logits_TE = logits_TE.float()
    is_bad_T1 = (logits_TE < math.inf).logical_not().any(-1, keepdim=True)
    weight_TK, expert_TK, _ = torch.ops.npu.npu_moe_gating_top_k_softmax(
        torch.where(is_bad_T1, 0.0, logits_TE), None, top_k
    )
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return torch.where(is_bad_T1, math.nan, weight_TK), expert_TK


def experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`reference.experts.experts`, but the products with down are rounded to x's dtype before they
    are weighted, and so are the weights: moe_finalize_routing takes both in one dtype.

    The residual is added apart: by its documentation the op adds two tensors or none.
    Pairs whose expert is elsewhere are sorted behind the others, as those of one more expert. By
    its documentation grouped_matmul does not write rows that no group has.
    """
    num_experts, double_width, hidden = gate_up_EGD.shape
    num_all = num_experts if local_X is None else len(local_X)
    check_experts(num_all, expert_TK.shape[1], double_width, hidden)
    check_experts(num_experts, 1)
    assert weight_TK.shape == expert_TK.shape, (weight_TK.shape, expert_TK.shape)
    assert down_EDF.dtype == gate_up_EGD.dtype, (down_EDF.dtype, gate_up_EGD.dtype)
    assert down_EDF.shape == (num_experts, hidden, double_width // 2), (
        gate_up_EGD.shape,
        down_EDF.shape,
    )
    if local_X is not None:
        local_TK = local_X.index_select(0, expert_TK.flatten()).view_as(expert_TK)
        is_here_TK = local_TK >= 0
        expert_TK = torch.where(is_here_TK, local_TK, num_experts)
        weight_TK = torch.where(is_here_TK, weight_TK, 0.0)
    num_sorted = num_experts + (local_X is not None)
    sorted_PD, place_P, count_E = _sort(x_TD, expert_TK, gate_up_EGD, num_sorted)
    count_E = count_E[:num_experts]
    inner_PF = torch.ops.npu.npu_swiglu(_products(sorted_PD, gate_up_EGD, count_E), -1)
    y_PD = _products(inner_PF, down_EDF, count_E)
    if local_X is not None:
        row_P1 = torch.arange(len(y_PD), device=y_PD.device).unsqueeze(1)
        y_PD = torch.where(row_P1 < count_E.sum(), y_PD, 0.0)
    y_TD = torch.ops.npu.npu_moe_finalize_routing(
        y_PD, None, None, None, weight_TK.to(x_TD.dtype), place_P, None, TOKEN_MAJOR
    )
    return y_TD if residual_TD is None else y_TD + residual_TD


def expert_linear(x: Tensor, expert_TK: Tensor, weight_EOD: Tensor) -> Tensor:
    """`reference.experts.expert_linear`: x is [T, D] or [T, K, D], the result [T, K, O]."""
    num_columns, size = weight_EOD.shape[1:]
    check_experts(weight_EOD.shape[0], expert_TK.shape[1], num_columns, size)
    # rows of x that belong to one pair alone are tokens with one expert
    owner_TK = expert_TK if x.dim() == 2 else expert_TK.reshape(-1, 1)
    num_experts = len(weight_EOD)
    sorted_PD, place_P, count_E = _sort(x.reshape(-1, size), owner_TK, weight_EOD, num_experts)
    y_PO = _products(sorted_PD, weight_EOD, count_E)
    return y_PO.index_select(0, place_P).view(*expert_TK.shape, num_columns)


def clamped_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    gate_up_bias_EG: Tensor,
    down_EDF: Tensor,
    down_bias_ED: Tensor,
    alpha: float,
    limit: float,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`reference.clamped.clamped_experts`, whose products are those of `expert_linear`."""

    def multiply(weight_EOD: Tensor) -> Product:
        return lambda x, own_TK: expert_linear(x, own_TK, weight_EOD)

    return by_products(
        (multiply(gate_up_EGD), multiply(down_EDF)), x_TD, weight_TK, expert_TK, gate_up_bias_EG,
        down_bias_ED, alpha, limit, residual_TD, local_X,
    )  # fmt: skip


def _sort(
    x_TD: Tensor, expert_TK: Tensor, weight_EOD: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of all pairs by expert, the place of each pair among them, and pairs per expert.

    Asserts shapes and dtypes: torchair accepts any, and the op would then read wrong memory.
    """
    assert expert_TK.dtype == torch.int32, expert_TK.dtype
    assert x_TD.dtype == weight_EOD.dtype, (x_TD.dtype, weight_EOD.dtype)
    assert x_TD.shape == (expert_TK.shape[0], weight_EOD.shape[2]), (
        x_TD.shape,
        expert_TK.shape,
        weight_EOD.shape,
    )
    sorted_PD, place_P, count_E, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x_TD,
        expert_TK,
        active_num=expert_TK.numel(),
        expert_num=num_experts,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        active_expert_range=[0, num_experts],
    )
    return sorted_PD, place_P, count_E


def _products(x_PN: Tensor, weight_EON: Tensor, count_E: Tensor) -> Tensor:
    """The rows of x times the transposed matrix of their expert: [P, O].

    The op takes a transposed matrix by its strides. In a graph of GE the transposition is an op,
    which GE fuses into the product if nothing is between the two.
    """
    (y_PO,) = torch.ops.npu.npu_grouped_matmul(
        [x_PN],
        [weight_EON.transpose(1, 2)],
        group_list=count_E,
        split_item=ONE_RESULT,
        group_type=BY_ROWS,
        group_list_type=SIZES,
    )
    return y_PO
