"""Selects the kernels of experts on a GPU: pair by pair for few tokens, else sorted into groups."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton import grouped_gemm, moe_gemv, moe_sort, offload
from nanovllm.kernels.triton.common import GELU, NO_CLAMP, Clamp, Places

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Pairs are sorted where more than a quarter as many pairs as experts make sharing likely.
PAIRS_PER_EXPERT = 0.25


def experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """See `reference.experts.experts`."""
    if not takes(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF):
        return reference.experts.experts(
            x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD, local_X
        )
    return run(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD, local_X=local_X)


def gelu_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """See `reference.experts.gelu_experts`."""
    arguments = (x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD)
    if not takes(*arguments[:5]):
        return reference.experts.gelu_experts(*arguments, local_X)
    return run(*arguments, local_X=local_X, clamp=GELU)


def offloaded_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    num_experts: int,
    first_1: Tensor,
    slot_I: Tensor,
    slots_gate_up_SGD: Tensor,
    slots_down_SDF: Tensor,
    others_gate_up: Tensor,
    others_down: Tensor,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """See `reference.offload.offloaded_experts`: the same launches as those of `experts`."""
    offload.wait_for_copies(others_gate_up)
    places = Places(num_experts, first_1, slot_I, others_gate_up, others_down)
    slots = (slots_gate_up_SGD, slots_down_SDF)
    if not takes(x_TD, weight_TK, expert_TK, *slots):
        return reference.offload.offloaded_experts(
            x_TD, weight_TK, expert_TK, num_experts, *places[1:3], *slots, *places[3:], residual_TD
        )
    return run(x_TD, weight_TK, expert_TK, *slots, residual_TD, places)


def takes(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> bool:
    """True if kernels take these."""
    tensors = (weight_TK, expert_TK, gate_up_EGD, down_EDF)
    return (
        x_TD.dtype in DTYPES
        and x_TD.dtype == gate_up_EGD.dtype == down_EDF.dtype
        and all(tensor.is_contiguous() for tensor in tensors)
        and x_TD.shape[0] > 0
    )


def run(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None,
    places: Places | None = None,
    local_X: Tensor | None = None,
    clamp: Clamp = NO_CLAMP,
) -> Tensor:
    """The launches for these sizes; with `clamp` those of `reference.clamped.clamped_experts`."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    residual_TD = None if residual_TD is None else residual_TD.contiguous()
    num_experts = gate_up_EGD.shape[0] if places is None else places.num_experts
    # the share of pairs that stay here is that of experts, if tokens are spread evenly
    num_experts = num_experts if local_X is None else len(local_X)
    is_few = x_TD.shape[0] == 1 or expert_TK.numel() <= PAIRS_PER_EXPERT * num_experts
    launch = moe_gemv.moe_gemv if is_few else grouped_gemm.grouped_experts
    return launch(
        x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD, local_X, places=places,
        clamp=clamp,
    )  # fmt: skip


def expert_linear(x: Tensor, expert_TK: Tensor, weight_EOD: Tensor) -> Tensor:
    """See `reference.experts.expert_linear`."""
    if (
        x.dtype not in DTYPES
        or x.dtype is not weight_EOD.dtype
        or not (expert_TK.is_contiguous() and weight_EOD.is_contiguous())
        or x.shape[0] == 0
    ):
        return reference.experts.expert_linear(x, expert_TK, weight_EOD)
    x_by = grouped_gemm.BY_TOKEN.value if x.dim() == 2 else grouped_gemm.BY_PAIR.value
    x_PD = x.contiguous().flatten(0, -2)
    groups = moe_sort.sort_pairs(expert_TK, weight_EOD.shape[0])
    out_PO = grouped_gemm.grouped_gemm(
        x_PD, weight_EOD, groups, expert_TK.shape[1], x_by=x_by, out_by=grouped_gemm.BY_PAIR.value
    )
    return out_PO.view(*expert_TK.shape, -1)
