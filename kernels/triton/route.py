"""Choice of experts in Triton: softmax, the K largest, their weights. One launch for all tokens.

A program takes some whole rows and finds the K experts of each by K searches for the largest
probability. With 128 experts and 8 of them active this is a few hundred comparisons a row.

Shapes: T tokens | K experts per token | E experts | A rows of one program; "p" after a letter:
padded to a power of two
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def choose_experts(logits_AEp, real_Ep, TOP_K: tl.constexpr, TOP_Kp: tl.constexpr):
    """(probability_AKp, expert_AKp), the likeliest first: see `reference.route`.

    Scores of experts that do not exist are ignored. Weights are not yet normalised. Rows without a
    finite maximum get NaN and the first experts.
    """
    id_1Ep = tl.arange(0, logits_AEp.shape[1])[None, :]
    k_1Kp = tl.arange(0, TOP_Kp)[None, :]
    rows: tl.constexpr = logits_AEp.shape[0]
    none: tl.constexpr = logits_AEp.shape[1]
    is_nan_A1 = (tl.max((logits_AEp != logits_AEp).to(tl.int32), 1) > 0)[:, None]
    score_AEp = tl.where(is_nan_A1, -id_1Ep.to(tl.float32), logits_AEp)
    score_AEp = tl.where(real_Ep[None, :], score_AEp, -INFINITY)
    max_A1 = tl.max(score_AEp, 1)[:, None]
    exp_AEp = tl.where(real_Ep[None, :], tl.exp(score_AEp - max_A1), 0.0)
    prob_AEp = exp_AEp / tl.sum(exp_AEp, 1)[:, None]
    # infinite logits give NaN, too
    is_nan_A1 = is_nan_A1 | (max_A1 == INFINITY) | (max_A1 == -INFINITY)
    left_AEp = tl.where(is_nan_A1, -id_1Ep.to(tl.float32), prob_AEp)
    left_AEp = tl.where(real_Ep[None, :], left_AEp, -INFINITY)
    weight_AKp = tl.zeros((rows, TOP_Kp), tl.float32)
    expert_AKp = tl.zeros((rows, TOP_Kp), tl.int32)
    for k in tl.static_range(TOP_K):
        largest_A1 = tl.max(left_AEp, 1)[:, None]
        chosen_A1 = tl.min(tl.where(left_AEp == largest_A1, id_1Ep, none), 1)[:, None]
        weight_AKp = tl.where(k_1Kp == k, largest_A1, weight_AKp)
        expert_AKp = tl.where(k_1Kp == k, chosen_A1, expert_AKp)
        left_AEp = tl.where(id_1Ep == chosen_A1, -INFINITY, left_AEp)
    return tl.where(is_nan_A1, float("nan"), weight_AKp), expert_AKp


@triton.jit
def store_choice(
    weight_AKp, expert_AKp, row_A, is_row_A, weight_ptr, expert_ptr, TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Store what `choose_experts` has found for some rows of [T, K]."""
    k_Kp = tl.arange(0, weight_AKp.shape[1])
    real_AKp = is_row_A[:, None] & (k_Kp < TOP_K)[None, :]
    if NORMALIZE:
        weight_AKp /= tl.sum(tl.where((k_Kp < TOP_K)[None, :], weight_AKp, 0.0), 1)[:, None]
    at_AKp = row_A[:, None] * TOP_K + k_Kp[None, :]
    tl.store(weight_ptr + at_AKp, weight_AKp, mask=real_AKp)
    tl.store(expert_ptr + at_AKp, expert_AKp, mask=real_AKp)


@triton.jit(do_not_specialize=["num_rows"])
def route_kernel(
    logits_ptr,  # [T, E]
    weight_ptr,  # [T, K] fp32, written
    expert_ptr,  # [T, K] int32, written
    logits_stride,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_KP: tl.constexpr,
    ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row_A = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_A = row_A < num_rows
    id_Ep = tl.arange(0, EXPERTS_P)
    real_Ep = id_Ep < NUM_EXPERTS
    logits_AEp = tl.load(
        logits_ptr + row_A.to(tl.int64)[:, None] * logits_stride + id_Ep[None, :],
        mask=is_row_A[:, None] & real_Ep[None, :],
        other=0.0,
    ).to(tl.float32)
    weight_AKp, expert_AKp = choose_experts(logits_AEp, real_Ep, TOP_K, TOP_KP)
    store_choice(weight_AKp, expert_AKp, row_A, is_row_A, weight_ptr, expert_ptr, TOP_K, NORMALIZE)


def route(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """See `reference.route`; last stride 1."""
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    (num_rows, num_experts), device = logits_TE.shape, logits_TE.device
    weight_TK = torch.empty((num_rows, top_k), dtype=torch.float32, device=device)
    expert_TK = torch.empty((num_rows, top_k), dtype=torch.int32, device=device)
    experts_p = triton.next_power_of_2(num_experts)
    rows = max(1, min(8, 512 // experts_p))
    route_kernel[(triton.cdiv(num_rows, rows),)](
        logits_TE,
        weight_TK,
        expert_TK,
        logits_TE.stride(0),
        num_rows,
        NUM_EXPERTS=num_experts,
        EXPERTS_P=experts_p,
        TOP_K=top_k,
        TOP_KP=triton.next_power_of_2(top_k),
        ROWS=rows,
        NORMALIZE=normalize,
        num_warps=4,
        **launch_options(device),
    )
    return weight_TK, expert_TK
