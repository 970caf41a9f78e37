"""Choice of experts by score and bias, within the best groups, in Triton: one launch.

A program is one warp, which takes some whole rows. It ranks the groups, then searches K times for
the best expert of each row.

Shapes: T tokens | K experts per token | E experts | G groups | e experts of a group | A rows of one
program; "p" after a letter: padded to a power of two
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

INFINITY = tl.constexpr(float("inf"))
LEAST = tl.constexpr(-(1 << 62))  # below every key


@triton.jit
def ordered(value, place, last: tl.constexpr):
    """Integers that order by value, then by place, the smaller first; NaN is the largest value."""
    value = tl.where(value != value, INFINITY, value)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (last - place).to(tl.int64)


@triton.jit(do_not_specialize=["num_rows"])
def group_topk_kernel(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E] fp32, read if HAS_BIAS
    weight_ptr,  # [T, K] fp32, written
    expert_ptr,  # [T, K] int32, written
    logits_stride,
    num_rows,
    smallest_sum,
    factor,
    GROUPS: tl.constexpr,
    GROUPS_P: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORES: tl.constexpr,
    SIZE: tl.constexpr,  # e
    SIZE_P: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    EXPERTS_P: tl.constexpr = GROUPS_P * SIZE_P
    wait_for_earlier_kernels(PDL)
    row_A = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_A = row_A < num_rows
    place_Ep = tl.arange(0, EXPERTS_P)
    group_Ep, in_group_Ep = place_Ep // SIZE_P, place_Ep % SIZE_P
    real_Ep = (group_Ep < GROUPS) & (in_group_Ep < SIZE)
    id_Ep = group_Ep * SIZE + in_group_Ep
    mask_AEp = is_row_A[:, None] & real_Ep[None, :]
    at_AEp = logits_ptr + row_A.to(tl.int64)[:, None] * logits_stride + id_Ep[None, :]
    logits_AEp = tl.load(at_AEp, mask=mask_AEp, other=0.0).to(tl.float32)
    has_nan_A = tl.max((logits_AEp != logits_AEp).to(tl.int32), 1) > 0
    if SIGMOID:
        score_AEp = 1.0 / (1.0 + tl.exp(-logits_AEp))
    else:
        logits_AEp = tl.where(real_Ep[None, :], logits_AEp, -INFINITY)
        exp_AEp = tl.exp(logits_AEp - tl.max(logits_AEp, 1)[:, None])
        score_AEp = exp_AEp / tl.sum(exp_AEp, 1)[:, None]
    choice_AEp = score_AEp
    if HAS_BIAS:
        choice_AEp += tl.load(bias_ptr + id_Ep, mask=real_Ep, other=0.0).to(tl.float32)[None, :]
    last: tl.constexpr = EXPERTS_P - 1
    key_AEp = ordered(choice_AEp, place_Ep[None, :], last)
    key_AEp = tl.where(real_Ep[None, :], key_AEp, LEAST)
    if TOP_GROUPS < GROUPS:
        key_AGe = tl.reshape(key_AEp, (ROWS, GROUPS_P, SIZE_P))
        choice_AGe = tl.reshape(choice_AEp, (ROWS, GROUPS_P, SIZE_P))
        rest_AGe = key_AGe
        worth_AG = tl.zeros((ROWS, GROUPS_P), tl.float32)
        for _ in tl.static_range(GROUP_SCORES):
            is_best_AGe = rest_AGe == tl.max(rest_AGe, 2)[:, :, None]
            worth_AG += tl.sum(tl.where(is_best_AGe, choice_AGe, 0.0), 2)
            rest_AGe = tl.where(is_best_AGe, LEAST, rest_AGe)
        number_Gp = tl.arange(0, GROUPS_P)
        rank_AG = ordered(worth_AG, number_Gp[None, :], GROUPS_P - 1)
        rank_AG = tl.where(number_Gp[None, :] < GROUPS, rank_AG, LEAST)
        is_in_AG = tl.zeros((ROWS, GROUPS_P), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            is_best_AG = rank_AG == tl.max(rank_AG, 1)[:, None]
            is_in_AG = tl.where(is_best_AG, 1, is_in_AG)
            rank_AG = tl.where(is_best_AG, LEAST, rank_AG)
        key_AGe = tl.where(is_in_AG[:, :, None] > 0, key_AGe, LEAST)
        key_AEp = tl.reshape(key_AGe, (ROWS, EXPERTS_P))
    weights = ()
    total_A = tl.zeros((ROWS,), tl.float32)
    for k in tl.static_range(TOP_K):
        is_best_AEp = key_AEp == tl.max(key_AEp, 1)[:, None]
        key_AEp = tl.where(is_best_AEp, LEAST, key_AEp)
        expert_A = tl.sum(tl.where(is_best_AEp, id_Ep[None, :], 0), 1)
        tl.store(expert_ptr + row_A * TOP_K + k, expert_A, mask=is_row_A)
        weight_A = tl.sum(tl.where(is_best_AEp, score_AEp, 0.0), 1)
        weights += (weight_A,)
        total_A += weight_A
    total_A = tl.where(total_A < smallest_sum, smallest_sum, total_A)
    for k in tl.static_range(TOP_K):
        weight_A = weights[k] / total_A if NORMALIZE else weights[k]
        weight_A = tl.where(has_nan_A, float("nan"), weight_A * factor)
        tl.store(weight_ptr + row_A * TOP_K + k, weight_A, mask=is_row_A)


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
    """See `reference.experts.group_topk`; last stride 1."""
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    (num_rows, num_experts), device = logits_TE.shape, logits_TE.device
    weight_TK = torch.empty((num_rows, top_k), dtype=torch.float32, device=device)
    expert_TK = torch.empty((num_rows, top_k), dtype=torch.int32, device=device)
    if num_rows == 0:
        return weight_TK, expert_TK
    sizes = group_constants(num_experts, num_groups, top_groups)
    group_topk_kernel[(triton.cdiv(num_rows, sizes["ROWS"]),)](
        logits_TE,
        logits_TE if bias_E is None else bias_E,
        weight_TK,
        expert_TK,
        logits_TE.stride(0),
        num_rows,
        smallest_sum,
        scale,
        **sizes,
        GROUP_SCORES=group_scores,
        TOP_K=top_k,
        SIGMOID=sigmoid,
        HAS_BIAS=bias_E is not None,
        NORMALIZE=normalize,
        num_warps=1,
        **launch_options(device),
    )
    return weight_TK, expert_TK


def group_constants(num_experts: int, num_groups: int, top_groups: int) -> dict[str, int]:
    """The kernel's constants for sizes of groups."""
    groups = num_groups if top_groups < num_groups else 1
    size = num_experts // groups
    groups_p, size_p = triton.next_power_of_2(groups), triton.next_power_of_2(size)
    return {
        "GROUPS": groups,
        "GROUPS_P": groups_p,
        "TOP_GROUPS": top_groups if groups > 1 else 1,
        "SIZE": size,
        "SIZE_P": size_p,
        "ROWS": max(1, min(8, 128 // (groups_p * size_p))),
    }
