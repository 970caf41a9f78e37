"""Pairs of a token and one of its experts: sorted by expert, and their results added by token.

Sorting is one launch with a program for each expert. It counts the pairs of smaller experts and
writes its own behind them. The sum of a token's results is always in the same order.

Shapes: T tokens | K experts per token | P = T·K pairs | E experts | X experts, with those elsewhere
| D hidden | B pairs or columns of one program at a time
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, local_expert, wait_for_earlier_kernels


class Groups(NamedTuple):
    """Pairs sorted by expert: expert e has pair_P[start_E1[e]] … pair_P[start_E1[e + 1] − 1].

    Pairs whose expert is elsewhere are not among them, and the rest of pair_P is undefined.
    `pairs_each` is the mean number of pairs of an expert.
    """

    pair_P: Tensor
    start_E1: Tensor
    pairs_each: float


@triton.jit(do_not_specialize=["num_pairs"])
def sort_pairs_kernel(
    expert_ptr,  # [P]
    local_ptr,  # [X], read if EXPERT_PARALLEL
    pair_ptr,  # [P] int32, written
    start_ptr,  # [E + 1] int32, written
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERT_PARALLEL: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    expert = tl.program_id(0)
    i_B = tl.arange(0, BLOCK)
    start = tl.sum(tl.zeros((BLOCK,), tl.int32))
    for first in tl.range(0, num_pairs, BLOCK):
        pair_B = first + i_B
        other_B = tl.load(expert_ptr + pair_B, mask=pair_B < num_pairs, other=-1)
        other_B = local_expert(local_ptr, other_B, EXPERT_PARALLEL)
        start += tl.sum(((other_B >= 0) & (other_B < expert)).to(tl.int32))
    tl.store(start_ptr + expert, start)
    for first in tl.range(0, num_pairs, BLOCK):
        pair_B = first + i_B
        other_B = tl.load(expert_ptr + pair_B, mask=pair_B < num_pairs, other=-1)
        other_B = local_expert(local_ptr, other_B, EXPERT_PARALLEL)
        is_mine_B = other_B == expert
        upto_B = tl.cumsum(is_mine_B.to(tl.int32), 0)
        tl.store(pair_ptr + start + upto_B - 1, pair_B, mask=is_mine_B)
        start += tl.sum(is_mine_B.to(tl.int32))
    if expert == NUM_EXPERTS - 1:
        tl.store(start_ptr + NUM_EXPERTS, start)


def sort_pairs(expert_TK: Tensor, num_experts: int, local_X: Tensor | None = None) -> Groups:
    """The pairs of [T, K] int32 experts, sorted by expert and then by number.

    With `local_X` they are sorted by the places of experts, of which `num_experts` are here.
    """
    num_pairs, device = expert_TK.numel(), expert_TK.device
    pair_P = torch.empty(num_pairs, dtype=torch.int32, device=device)
    start_E1 = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    block = min(4096, max(128, triton.next_power_of_2(num_pairs)))
    sort_pairs_kernel[(num_experts,)](
        expert_TK,
        expert_TK if local_X is None else local_X,
        pair_P,
        start_E1,
        num_pairs,
        NUM_EXPERTS=num_experts,
        BLOCK=block,
        EXPERT_PARALLEL=local_X is not None,
        num_warps=4 if block <= 2048 else 8,
        **launch_options(device),
    )
    num_all = num_experts if local_X is None else len(local_X)
    return Groups(pair_P, start_E1, num_pairs / num_all)


@triton.jit(do_not_specialize=["last"])
def gather_kernel(
    x_ptr,  # [T, D]
    pair_ptr,  # [P] int32
    start_ptr,  # [E + 1] int32
    out_ptr,  # [P, D], written
    last,
    x_stride,
    TOP_K: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    place = tl.program_id(0).to(tl.int64)
    if place >= tl.load(start_ptr + last):
        return
    d_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = (tl.load(pair_ptr + place) // TOP_K).to(tl.int64)
    x_B = tl.load(x_ptr + token * x_stride + d_B, mask=d_B < DIM)
    tl.store(out_ptr + place * DIM + d_B, x_B, mask=d_B < DIM)


def gather(x_TD: Tensor, groups: Groups, top_k: int) -> Tensor:
    """The tokens of sorted pairs in their order: [P, D]. The rest is undefined."""
    num_pairs, dim = len(groups.pair_P), x_TD.shape[1]
    out_PD = torch.empty((num_pairs, dim), dtype=x_TD.dtype, device=x_TD.device)
    block = min(2048, triton.next_power_of_2(dim))
    gather_kernel[(num_pairs, triton.cdiv(dim, block))](
        x_TD,
        groups.pair_P,
        groups.start_E1,
        out_PD,
        len(groups.start_E1) - 1,
        x_TD.stride(0),
        TOP_K=top_k,
        DIM=dim,
        BLOCK=block,
        num_warps=4,
        **launch_options(x_TD.device),
    )
    return out_PD


@triton.jit
def combine_kernel(
    y_ptr,  # [P, D]
    expert_ptr,  # [P], read if EXPERT_PARALLEL
    local_ptr,  # [X], read if EXPERT_PARALLEL
    residual_ptr,  # [T, D], read if HAS_RESIDUAL
    out_ptr,  # [T, D], written
    TOP_K: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EXPERT_PARALLEL: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(1).to(tl.int64)
    d_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_B = d_B < DIM
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        real_B = mask_B
        if EXPERT_PARALLEL:  # rows of other pairs were not written
            real_B = mask_B & (
                local_expert(local_ptr, tl.load(expert_ptr + pair), EXPERT_PARALLEL) >= 0
            )
        y_B = tl.load(y_ptr + pair * DIM + d_B, mask=real_B, other=0.0)
        sum_B += y_B.to(tl.float32)
    sum_B = sum_B.to(dtype)
    if HAS_RESIDUAL:
        residual_B = tl.load(residual_ptr + token * DIM + d_B, mask=mask_B, other=0.0)
        sum_B = (sum_B.to(tl.float32) + residual_B.to(tl.float32)).to(dtype)
    tl.store(out_ptr + token * DIM + d_B, sum_B, mask=mask_B)


def combine(
    y_PD: Tensor, expert_TK: Tensor, residual_TD: Tensor | None, local_X: Tensor | None = None
) -> Tensor:
    """The sum of each token's rows of y, in their order, plus the residual: [T, D].

    With `local_X` rows of experts that are elsewhere are not read.
    """
    (num_tokens, top_k), dim = expert_TK.shape, y_PD.shape[1]
    out_TD = torch.empty((num_tokens, dim), dtype=y_PD.dtype, device=y_PD.device)
    block = min(1024, triton.next_power_of_2(dim))
    combine_kernel[(triton.cdiv(dim, block), num_tokens)](
        y_PD,
        expert_TK,
        expert_TK if local_X is None else local_X,
        y_PD if residual_TD is None else residual_TD,
        out_TD,
        TOP_K=top_k,
        DIM=dim,
        BLOCK=block,
        HAS_RESIDUAL=residual_TD is not None,
        EXPERT_PARALLEL=local_X is not None,
        num_warps=4,
        **launch_options(y_PD.device),
    )
    return out_TD
