"""Choice of experts in Triton: softmax, the K largest, their weights. One launch for all tokens.

A program is one warp, which takes some whole rows and searches K times for the likeliest expert of
each. For a single token, the norm before and the product with the router are in the same launch:
one expert per warp, and the last program chooses.

Shapes: T tokens | K experts per token | E experts | D hidden | A rows of one program | W warps | C
columns of a chunk; "p" after a letter: padded to a power of two
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton.common import (
    arrival_counters,
    launch_options,
    wait_for_earlier_kernels,
)

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def choose_experts(logits_AEp, real_Ep, row_A, is_row_A, weight_ptr, expert_ptr,
                   TOP_K: tl.constexpr, NORMALIZE: tl.constexpr):  # fmt: skip
    """Chooses the experts of some rows and stores them to [T, K] as
    `reference.experts.topk_softmax`.

    `real_Ep` is false for experts that do not exist.
    """
    last: tl.constexpr = logits_AEp.shape[1] - 1
    id_1Ep = tl.arange(0, last + 1)[None, :]
    logits_AEp = tl.where(real_Ep[None, :], logits_AEp, -INFINITY)
    max_A = tl.max(logits_AEp, 1)
    # the maximum of a row with NaN need not be NaN
    is_bad_A = tl.sum((logits_AEp != logits_AEp).to(tl.int32), 1) > 0
    is_bad_A = is_bad_A | (max_A == INFINITY) | (max_A == -INFINITY)
    exp_AEp = tl.exp(logits_AEp - max_A[:, None])
    prob_AEp = tl.where(is_bad_A[:, None], 0.0, exp_AEp / tl.sum(exp_AEp, 1)[:, None])
    # One number orders by probability, whose bits as an integer have its order, then by id.
    key_AEp = (prob_AEp.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (last - id_1Ep)
    key_AEp = tl.where(real_Ep[None, :], key_AEp, -1)
    weights = ()
    total_A = tl.zeros_like(max_A)
    for k in tl.static_range(TOP_K):
        largest_A = tl.max(key_AEp, 1)
        key_AEp = tl.where(key_AEp == largest_A[:, None], -1, key_AEp)
        expert_A = last - (largest_A & 0x7FFFFFFF).to(tl.int32)
        tl.store(expert_ptr + row_A * TOP_K + k, expert_A, mask=is_row_A)
        weight_A = (largest_A >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        weights += (weight_A,)
        total_A += weight_A
    for k in tl.static_range(TOP_K):
        weight_A = weights[k] / total_A if NORMALIZE else weights[k]
        weight_A = tl.where(is_bad_A, float("nan"), weight_A)
        tl.store(weight_ptr + row_A * TOP_K + k, weight_A, mask=is_row_A)


@triton.jit(do_not_specialize=["num_rows"])
def topk_softmax_kernel(
    logits_ptr,  # [T, E]
    weight_ptr,  # [T, K] fp32, written
    expert_ptr,  # [T, K] int32, written
    logits_stride,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    TOP_K: tl.constexpr,
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
    choose_experts(logits_AEp, real_Ep, row_A, is_row_A, weight_ptr, expert_ptr, TOP_K, NORMALIZE)


def topk_softmax(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """See `reference.experts.topk_softmax`; last stride 1."""
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    (num_rows, num_experts), device = logits_TE.shape, logits_TE.device
    weight_TK = torch.empty((num_rows, top_k), dtype=torch.float32, device=device)
    expert_TK = torch.empty((num_rows, top_k), dtype=torch.int32, device=device)
    experts_p = triton.next_power_of_2(num_experts)
    rows = max(1, min(8, 128 // experts_p))
    topk_softmax_kernel[(triton.cdiv(num_rows, rows),)](
        logits_TE,
        weight_TK,
        expert_TK,
        logits_TE.stride(0),
        num_rows,
        NUM_EXPERTS=num_experts,
        EXPERTS_P=experts_p,
        TOP_K=top_k,
        ROWS=rows,
        NORMALIZE=normalize,
        num_warps=1,
        **launch_options(device),
    )
    return weight_TK, expert_TK


@triton.jit
def norm_router_topk_kernel(
    x_ptr,  # [D]
    norm_ptr,  # [D]
    router_ptr,  # [E, D]
    normed_ptr,  # [D], written
    logits_ptr,  # [E] fp32, written
    weight_ptr,  # [K] fp32, written
    expert_ptr,  # [K] int32, written
    arrived_ptr,  # int32: zero before and after each launch
    bias_ptr,  # [E], None unless HAS_BIAS
    eps,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each warp scores one expert; the program that arrives last chooses among all of them."""
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = (DEPTH + COLUMNS - 1) // COLUMNS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    expert_W = tl.program_id(0) * WARPS + tl.arange(0, WARPS)
    is_expert_W = expert_W < NUM_EXPERTS
    d_1C = tl.arange(0, COLUMNS)[None, :]
    d_WC = d_1C + tl.zeros((WARPS, 1), tl.int32)  # every warp has a copy of x
    router_at = router_ptr + expert_W[:, None] * DEPTH + d_1C
    router, norm, x = (), (), ()
    for chunk in tl.static_range(CHUNKS):
        is_column_WC = chunk * COLUMNS + d_WC < DEPTH
        mask_WC = is_column_WC & is_expert_W[:, None]
        router += (tl.load(router_at + chunk * COLUMNS, mask=mask_WC, other=0.0),)
        norm += (tl.load(norm_ptr + chunk * COLUMNS + d_WC, mask=is_column_WC, other=0.0),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for chunk in tl.static_range(CHUNKS):
        is_column_WC = chunk * COLUMNS + d_WC < DEPTH
        x += (tl.load(x_ptr + chunk * COLUMNS + d_WC, mask=is_column_WC, other=0.0),)
    square_WC = tl.zeros((WARPS, COLUMNS), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        square_WC += x[chunk].to(tl.float32) * x[chunk].to(tl.float32)
    factor_W1 = tl.rsqrt(tl.sum(square_WC, 1) / DEPTH + eps)[:, None]
    acc_WC = tl.zeros((WARPS, COLUMNS), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        y_WC = (x[chunk].to(tl.float32) * factor_W1).to(dtype).to(tl.float32)
        y_WC = (y_WC * norm[chunk].to(tl.float32)).to(dtype)
        acc_WC += router[chunk].to(tl.float32) * y_WC.to(tl.float32)
        # the programs divide the columns between them; their warps store the same values
        is_mine = chunk % tl.num_programs(0) == tl.program_id(0)
        at_WC = chunk * COLUMNS + d_WC
        tl.store(normed_ptr + at_WC, y_WC, mask=is_mine & (at_WC < DEPTH))
    logits_W = tl.sum(acc_WC, 1)
    if HAS_BIAS:
        logits_W += tl.load(bias_ptr + expert_W, mask=is_expert_W, other=0.0).to(tl.float32)
    logits_W = logits_W.to(dtype).to(tl.float32)
    tl.store(logits_ptr + expert_W, logits_W, mask=is_expert_W)
    # all threads store before the one thread's release; its acquire comes before all loads
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") != tl.num_programs(0) - 1:
        return
    tl.store(arrived_ptr, 0)
    id_Ep = tl.arange(0, EXPERTS_P)
    real_Ep = id_Ep < NUM_EXPERTS
    # other multiprocessors wrote these, so .cg bypasses L1
    logits_Ep = tl.load(logits_ptr + id_Ep, mask=real_Ep, other=0.0, cache_modifier=".cg")
    row_A = tl.zeros((1,), tl.int32)
    choose_experts(
        logits_Ep[None, :], real_Ep, row_A, row_A == 0, weight_ptr, expert_ptr, TOP_K, NORMALIZE
    )


MAX_DEPTH = 4096  # a warp holds a row of the router, the norm's weight and x in registers


def takes(x_TD: Tensor, router_ED: Tensor) -> bool:
    """True if `norm_router_topk` is one launch for these."""
    return x_TD.shape[0] == 1 and router_ED.shape[1] <= MAX_DEPTH


def norm_router_topk(
    x_TD: Tensor,
    norm_D: Tensor,
    router_ED: Tensor,
    eps: float,
    top_k: int,
    normalize: bool,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.experts.norm_router_topk` for inputs that `takes` accepts. The logits are
    rounded as there.

    The weights may be read before earlier kernels end, so no running kernel may write them.
    """
    (num_experts, depth), device = router_ED.shape, x_TD.device
    if (
        not takes(x_TD, router_ED)
        or not x_TD.dtype == norm_D.dtype == router_ED.dtype
        or x_TD.stride(1) != 1
        or not router_ED.is_contiguous()
    ):
        return reference.experts.norm_router_topk(
            x_TD, norm_D, router_ED, eps, top_k, normalize, bias_E
        )
    normed_TD = torch.empty_like(x_TD)
    logits_E = torch.empty(num_experts, dtype=torch.float32, device=device)
    weight_TK = torch.empty((1, top_k), dtype=torch.float32, device=device)
    expert_TK = torch.empty((1, top_k), dtype=torch.int32, device=device)
    num_warps = 4
    norm_router_topk_kernel[(triton.cdiv(num_experts, num_warps),)](
        x_TD,
        norm_D,
        router_ED,
        normed_TD,
        logits_E,
        weight_TK,
        expert_TK,
        arrival_counters(device, 1),
        bias_E,
        eps,
        NUM_EXPERTS=num_experts,
        EXPERTS_P=triton.next_power_of_2(num_experts),
        DEPTH=depth,
        COLUMNS=256,
        WARPS=num_warps,
        TOP_K=top_k,
        NORMALIZE=normalize,
        HAS_BIAS=bias_E is not None,
        num_warps=num_warps,
        **launch_options(device),
    )
    return normed_TD, weight_TK, expert_TK
