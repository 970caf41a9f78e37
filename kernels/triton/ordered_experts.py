"""Experts of deterministic engines in Triton: always sorted into groups, also for one token.

In grouped_gemm.py the weights are the left operand, and the sum of an output is one chain along the
depth, whatever the rows of a tile. A token's results are added in the order of its choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.triton import grouped_gemm
from nanovllm.kernels.triton.common import shared_memory_bytes

LEAST_ROWS = 16  # for fewer Triton takes another instruction


def ordered_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`reference.experts.experts` of bf16 and fp16. Raises ValueError for what it does not take."""
    dtype = x_TD.dtype
    tensors = (weight_TK, expert_TK, gate_up_EGD, down_EDF)
    is_same = dtype == gate_up_EGD.dtype == down_EDF.dtype
    dense = all(tensor.is_contiguous() for tensor in tensors)
    if dtype not in (torch.bfloat16, torch.float16) or not is_same or not dense or not len(x_TD):
        raise ValueError(
            f"ordered_experts takes contiguous weights in bf16 or fp16, not {dtype} with "
            f"{gate_up_EGD.dtype} and {down_EDF.dtype}"
        )
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    residual_TD = None if residual_TD is None else residual_TD.contiguous()
    num_experts = gate_up_EGD.shape[0] if local_X is None else len(local_X)
    pairs_each, shared_bytes = expert_TK.numel() / num_experts, shared_memory_bytes(x_TD.device)
    gated = grouped_gemm.grouped_tile(pairs_each, True, 2, shared_bytes)
    down = grouped_gemm.grouped_tile(pairs_each, False, 2, shared_bytes)
    tiles = gated, down._replace(rows=max(LEAST_ROWS, down.rows))
    return grouped_gemm.grouped_experts(
        x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD, local_X, tiles=tiles
    )
