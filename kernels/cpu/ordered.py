"""Ops of deterministic engines on a CPU: kernels of `kernels.cpp` whose sums have one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.cpu.attention import paged_attention
from nanovllm.kernels.cpu.experts import experts
from nanovllm.kernels.cpu.linear import _product
from nanovllm.kernels.cpu.norm_act import rms_norm
from nanovllm.kernels.cpu.norm_act import silu_mul as gated

DTYPES = (torch.float32, torch.bfloat16)


def ordered_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
    eps: float = 0.0,
    silu_mul: bool = False,
) -> Tensor:
    """`reference.ordered.ordered_linear` by the kernel of few rows: a result depends on its row of
    x and its row of weights alone. Raises TypeError for what the kernel does not take."""
    dtype = x_TD.dtype
    same = weight_OD.dtype is dtype and (bias_O is None or bias_O.dtype is dtype)
    if x_TD.dim() != 2 or dtype not in DTYPES or not same or weight_OD.stride(1) != 1:
        raise TypeError(
            f"ordered_linear takes two dimensions of fp32 or bf16, not {list(x_TD.shape)} of "
            f"{dtype} and weights of {weight_OD.dtype}"
        )
    if not x_TD.numel():
        return x_TD.new_empty((x_TD.shape[0], weight_OD.shape[0] // (1 + silu_mul)))
    x_TD = x_TD if norm_weight_D is None else rms_norm(x_TD, norm_weight_D, eps)
    bias_O = None if bias_O is None else bias_O.contiguous()
    y_TO = _product(x_TD, weight_OD, bias_O, ordered=True)
    y_TO = gated(y_TO) if silu_mul else y_TO
    return y_TO if residual_TO is None else y_TO.add_(residual_TO)


def ordered_attention(q_TNH: Tensor, *rest: Any) -> Tensor:
    """`reference.attention.paged_attention`, decode steps too, in tiles of queries: the keys of a
    query are added in steps that begin at fixed positions."""
    if q_TNH.dtype not in DTYPES:
        raise TypeError(f"ordered_attention takes fp32 or bf16, not {q_TNH.dtype}")
    return paged_attention(q_TNH, *rest, ordered=True)


KERNELS: dict[str, Callable[..., object]] = {
    "ordered_attention": ordered_attention,
    "ordered_experts": experts,  # sums never depend on the other tokens of a call
    "ordered_linear": ordered_linear,
    "ordered_norm": rms_norm,
}


def register() -> None:
    """Register the kernels for the dispatch key CPU."""
    ops.register_kernels("CPU", KERNELS)
