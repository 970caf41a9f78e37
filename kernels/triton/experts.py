"""Selects the kernels of experts on a GPU: pair by pair for few tokens, else sorted into groups."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton import experts_few as few
from nanovllm.kernels.triton import experts_many as many

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
) -> Tensor:
    """See `reference.experts`."""
    tensors = (weight_TK, expert_TK, gate_up_EGD, down_EDF)
    if (
        x_TD.dtype not in DTYPES
        or not x_TD.dtype == gate_up_EGD.dtype == down_EDF.dtype
        or not all(tensor.is_contiguous() for tensor in tensors)
        or x_TD.shape[0] == 0
    ):
        return reference.experts(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    residual_TD = None if residual_TD is None else residual_TD.contiguous()
    num_tokens = x_TD.shape[0]
    is_few = num_tokens == 1 or expert_TK.numel() <= PAIRS_PER_EXPERT * gate_up_EGD.shape[0]
    run = few.few_experts if is_few else many.many_experts
    return run(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD)


def expert_linear(x: Tensor, expert_TK: Tensor, weight_EOD: Tensor) -> Tensor:
    """See `reference.expert_linear`."""
    if (
        x.dtype not in DTYPES
        or x.dtype is not weight_EOD.dtype
        or not (expert_TK.is_contiguous() and weight_EOD.is_contiguous())
        or x.shape[0] == 0
    ):
        return reference.expert_linear(x, expert_TK, weight_EOD)
    x_by = many.BY_TOKEN.value if x.dim() == 2 else many.BY_PAIR.value
    x_PD = x.contiguous().flatten(0, -2)
    groups = many.sort_pairs(expert_TK, weight_EOD.shape[0])
    out_PO = many.group_linear(
        x_PD, weight_EOD, groups, expert_TK.shape[1], x_by=x_by, out_by=many.BY_PAIR.value
    )
    return out_PO.view(*expert_TK.shape, -1)
