"""Choice of experts from groups in Triton: scores, the best groups, the best K, their weights.

A program is one warp, which takes one token and holds its scores as [groups, experts of a group].
It searches for the best groups and then K times for the best expert.

Shapes: T tokens | K experts per token | E experts | G groups | e = E / G; "p" after a letter:
padded to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

INFINITY = tl.constexpr(float("inf"))
NEVER = tl.constexpr(-(1 << 63))


@triton.jit
def _keys(x, id, last: tl.constexpr):
    """A number that orders by x, and among equals puts smaller ids first."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers have the reverse order
    return (ordered.to(tl.int64) << 32) | (last - id).to(tl.int64)


@triton.jit
def _allowed_groups(choice_GpEp, real_Ep, real_Gp, GROUPS_P: tl.constexpr, TOP_GROUPS: tl.constexpr,
                    GROUP_SCORES: tl.constexpr, EACH_P: tl.constexpr):  # fmt: skip
    """The groups with the largest sums of their GROUP_SCORES best choices."""
    group_Gp = tl.arange(0, GROUPS_P)
    each_1Ep = tl.arange(0, EACH_P)[None, :]
    key_GpEp = tl.where(real_Ep[None, :], _keys(choice_GpEp, each_1Ep, EACH_P - 1), NEVER)
    sum_Gp = tl.zeros([GROUPS_P], tl.float32)
    for _ in tl.static_range(GROUP_SCORES):
        best_Gp1 = tl.max(key_GpEp, 1)[:, None]
        sum_Gp += tl.sum(tl.where(key_GpEp == best_Gp1, choice_GpEp, 0.0), 1)
        key_GpEp = tl.where(key_GpEp == best_Gp1, NEVER, key_GpEp)
    key_Gp = tl.where(real_Gp, _keys(sum_Gp, group_Gp, GROUPS_P - 1), NEVER)
    allowed_Gp = tl.zeros([GROUPS_P], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.max(key_Gp, 0)
        allowed_Gp = tl.where(key_Gp == best, 1, allowed_Gp)
        key_Gp = tl.where(key_Gp == best, NEVER, key_Gp)
    return allowed_Gp > 0


@triton.jit
def topk_grouped_kernel(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E] fp32
    weight_ptr,  # [T, K] fp32, written
    expert_ptr,  # [T, K] int32, written
    logits_stride,
    factor,
    GROUPS: tl.constexpr,
    GROUPS_P: tl.constexpr,
    EACH: tl.constexpr,
    EACH_P: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORES: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    group_Gp, each_Ep = tl.arange(0, GROUPS_P), tl.arange(0, EACH_P)
    real_Gp, real_Ep = group_Gp < GROUPS, each_Ep < EACH
    real_GpEp = real_Gp[:, None] & real_Ep[None, :]
    id_GpEp = group_Gp[:, None] * EACH + each_Ep[None, :]
    logits_GpEp = tl.load(
        logits_ptr + row * logits_stride + id_GpEp, mask=real_GpEp, other=-INFINITY
    ).to(tl.float32)
    is_bad = tl.sum(tl.sum((logits_GpEp != logits_GpEp).to(tl.int32), 1), 0) > 0
    if SIGMOID:
        score_GpEp = 1.0 / (1.0 + tl.exp(-logits_GpEp))
    else:
        largest = tl.max(tl.max(logits_GpEp, 1), 0)
        is_bad = is_bad | (largest == INFINITY) | (largest == -INFINITY)
        exp_GpEp = tl.exp(logits_GpEp - largest)
        score_GpEp = exp_GpEp / tl.sum(tl.sum(exp_GpEp, 1), 0)
    score_GpEp = tl.where(is_bad, 0.0, score_GpEp)
    choice_GpEp = score_GpEp
    if HAS_BIAS:
        choice_GpEp += tl.load(bias_ptr + id_GpEp, mask=real_GpEp, other=0.0)
    LAST: tl.constexpr = GROUPS * EACH - 1
    key_GpEp = tl.where(real_GpEp, _keys(choice_GpEp, id_GpEp, LAST), NEVER)
    if TOP_GROUPS < GROUPS:
        allowed_Gp = _allowed_groups(
            choice_GpEp, real_Ep, real_Gp, GROUPS_P, TOP_GROUPS, GROUP_SCORES, EACH_P
        )
        key_GpEp = tl.where(allowed_Gp[:, None], key_GpEp, NEVER)
    weights = ()
    total = 1e-20
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.max(key_GpEp, 1), 0)
        is_best_GpEp = key_GpEp == best
        weight = tl.sum(tl.sum(tl.where(is_best_GpEp, score_GpEp, 0.0), 1), 0)
        key_GpEp = tl.where(is_best_GpEp, NEVER, key_GpEp)
        tl.store(expert_ptr + row * TOP_K + k, (LAST - (best & 0x7FFFFFFF)).to(tl.int32))
        weights += (weight,)
        total += weight
    for k in tl.static_range(TOP_K):
        weight = weights[k] / total if NORMALIZE else weights[k]
        weight = tl.where(is_bad, float("nan"), weight * factor)
        tl.store(weight_ptr + row * TOP_K + k, weight)


def topk_grouped(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    is_sigmoid: bool,
    normalize: bool,
    num_groups: int,
    top_groups: int,
    group_scores: int,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.experts.topk_grouped`."""
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    (num_rows, num_experts), device = logits_TE.shape, logits_TE.device
    weight_TK = torch.empty((num_rows, top_k), dtype=torch.float32, device=device)
    expert_TK = torch.empty((num_rows, top_k), dtype=torch.int32, device=device)
    if num_rows == 0:
        return weight_TK, expert_TK
    topk_grouped_kernel[(num_rows,)](
        logits_TE,
        weight_TK if bias_E is None else bias_E,
        weight_TK,
        expert_TK,
        logits_TE.stride(0),
        factor,
        **grouped_constants(num_experts, num_groups),
        TOP_K=top_k,
        TOP_GROUPS=top_groups,
        GROUP_SCORES=group_scores,
        SIGMOID=is_sigmoid,
        HAS_BIAS=bias_E is not None,
        NORMALIZE=normalize,
        num_warps=1,
        **launch_options(device),
    )
    return weight_TK, expert_TK


def grouped_constants(num_experts: int, num_groups: int) -> dict[str, int]:
    """The kernel's constants for sizes of groups."""
    each = num_experts // num_groups
    return {
        "GROUPS": num_groups,
        "GROUPS_P": triton.next_power_of_2(num_groups),
        "EACH": each,
        "EACH_P": triton.next_power_of_2(each),
    }
