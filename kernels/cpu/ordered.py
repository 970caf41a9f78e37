"""Ops of deterministic engines on a CPU: kernels of `kernels.cpp` whose sums have one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.cpu import ggml, packed
from nanovllm.kernels.cpu.attention import paged_attention
from nanovllm.kernels.cpu.experts import experts
from nanovllm.kernels.cpu.linear import _product, linear_int8
from nanovllm.kernels.cpu.norm_act import silu_mul as gated

DTYPES = (torch.float32, torch.bfloat16)


def ordered_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
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


def ordered_linear_int8(x_TD: Tensor, weight_OD: Tensor, scale_O: Tensor, *rest: Any) -> Tensor:
    """`reference.linear.linear_int8` by the kernel of few rows."""
    is_known = x_TD.dtype in DTYPES and x_TD.dim() == 2 and weight_OD.stride(1) == 1
    if not is_known or scale_O.dtype is not torch.float32 or not scale_O.is_contiguous():
        raise TypeError(f"ordered_linear_int8 takes fp32 or bf16, not {x_TD.dtype}")
    return linear_int8(x_TD, weight_OD, scale_O, *rest, ordered=True)


def ordered_packed_linear(
    x_TD: Tensor,
    code_OC: Tensor,
    scale_OG: Tensor,
    offset_OG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    *rest: Any,
) -> Tensor:
    """`reference.packed.packed_linear` by the kernel of few rows."""
    weight = packed.Weight(code_OC, scale_OG, offset_OG, table, bits, group)
    return _of_packed(x_TD, weight, *rest)


def ordered_fp8_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_RG: Tensor,
    block_rows: int,
    block_columns: int,
    *rest: Any,
) -> Tensor:
    """`reference.packed.fp8_linear` by the kernel of few rows."""
    weight = packed.of_fp8(weight_OD, scale_RG, block_rows, block_columns)
    return _of_packed(x_TD, weight, *rest)


def ordered_ggml_linear(x_TD: Tensor, block_OB: Tensor, ggml_type: int, *rest: Any) -> Tensor:
    """`reference.ggml.ggml_linear` by the kernel of few rows."""
    if not x_TD.numel():
        return x_TD.new_empty((x_TD.shape[0], block_OB.shape[0]))
    if packed.are_exact():
        raise ValueError(
            "deterministic=True does not go with NANOVLLM_EXACT_INPUTS=1 for blocks of GGUF files: "
            "torch multiplies them"
        )
    if not ggml.covers(x_TD, block_OB, ggml_type):
        raise TypeError(f"no product with one order of sums for blocks of type {ggml_type}")
    return ggml.ggml_linear(x_TD, block_OB, ggml_type, *rest, ordered=True)


def _of_packed(
    x_TD: Tensor, weight: packed.Weight, bias_O: Tensor | None, residual_TO: Tensor | None = None
) -> Tensor:
    if not x_TD.numel():
        return x_TD.new_empty((x_TD.shape[0], weight.num_outputs))
    found = packed.product(x_TD, weight, bias_O, residual_TO, ordered=True)
    if found is None:
        raise TypeError(
            f"products of packed weights with one order of sums take fp32 or bf16, not "
            f"{list(x_TD.shape)} of {x_TD.dtype} and codes of {weight.code.dtype}"
        )
    return found


def ordered_add_lora(
    y_TO: Tensor,
    x_TD: Tensor,
    adapter_T: Tensor,
    order_T: Tensor,
    tile_T3: Tensor,
    a_NLD: Tensor,
    b_NOR: Tensor,
    rows: list[int],
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`reference.lora.add_lora`, by products of one slot's tokens each: the slot of an adapter
    changes no sum."""
    out_TO, rank = y_TO.to(torch.float32, copy=True), b_NOR.shape[2]
    for slot in adapter_T.unique().tolist():
        if slot == 0:
            continue
        token_S = (adapter_T == slot).nonzero().squeeze(1)
        x_SD = x_TD.index_select(0, token_S).float()
        z_SL = _product(x_SD, a_NLD[slot - 1].float(), None, ordered=True).to(x_TD.dtype).float()
        parts = zip(z_SL.split(rank, dim=1), b_NOR[slot - 1].float().split(rows), strict=True)
        added = [_product(z_SR.contiguous(), b_PR, None, ordered=True) for z_SR, b_PR in parts]
        out_TO.index_add_(0, token_S, torch.cat(added, dim=1))
    out_TO = out_TO.to(y_TO.dtype)
    return out_TO if residual_TO is None else out_TO + residual_TO


KERNELS: dict[str, Callable[..., object]] = {
    "ordered_add_lora": ordered_add_lora,
    "ordered_fp8_linear": ordered_fp8_linear,
    "ordered_ggml_linear": ordered_ggml_linear,
    "ordered_linear_int8": ordered_linear_int8,
    "ordered_packed_linear": ordered_packed_linear,
    "ordered_attention": ordered_attention,
    "ordered_experts": experts,  # sums never depend on the other tokens of a call
    "ordered_linear": ordered_linear,
}


def register() -> None:
    """Register the kernels for the dispatch key CPU."""
    ops.register_kernels("CPU", KERNELS)
