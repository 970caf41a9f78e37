"""Products of few tokens, and of int8 weights: kernels of `linear.h`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cpu.library import DTYPE_CODES, LINEAR, WIDEN, load

# bf16 times int8: from _WIDEN_TOKENS tokens on, weights are widened to bf16 for torch's own
# product, _WIDEN_BYTES at a time so that they stay in a cache.
_WIDEN_TOKENS, _WIDEN_BYTES = 33, 4 << 20

# oneDNN's bf16 product on AMX reads rows in pieces of so many elements, also past their end: a NaN
# that lies there spoils the row (torch 2.13, Xeon with AMX).
_AMX_DEPTH = 32


@functools.cache
def _linear_max_tokens(dtype: torch.dtype) -> int:
    code = DTYPE_CODES.get(dtype)
    return 0 if code is None else load().nanovllm_small_m_linear_max_tokens(code)


def prefers_own_linear(num_tokens: int, dtype: torch.dtype = torch.float32) -> bool:
    """True if our `linear` is faster than torch's for this many tokens."""
    return num_tokens <= _linear_max_tokens(dtype)


def linear(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None = None
) -> Tensor:
    """`reference.linear.linear`; adds the residual in place."""
    y_TO = _product(x_TD, weight_OD, bias_O)
    return y_TO if residual_TO is None else y_TO.add_(residual_TO)


def _product(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, *, ordered: bool = False
) -> Tensor:
    """x · weightᵀ + bias. With few tokens the weights are read once, at the speed of memory.

    With 512-bit vectors fp32 takes any number of tokens. Where F.linear is faster, F.linear runs,
    unless `ordered`: then any number of tokens takes the kernel of few.
    """
    dtype = x_TD.dtype
    if (
        x_TD.dim() != 2
        or (x_TD.shape[0] > _linear_max_tokens(dtype) and not ordered)
        or weight_OD.dtype is not dtype
        or weight_OD.stride(1) != 1
        or (bias_O is not None and (bias_O.dtype is not dtype or not bias_O.is_contiguous()))
        or not x_TD.numel()
    ):
        return _torch_product(x_TD, weight_OD, bias_O)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    num_tokens, depth = x_TD.shape
    num_outputs = weight_OD.shape[0]
    out_TO = x_TD.new_empty((num_tokens, num_outputs))
    load().nanovllm_small_m_linear(
        LINEAR.pack(
            out_TO.data_ptr(),
            x_TD.data_ptr(),
            weight_OD.data_ptr(),
            0 if bias_O is None else bias_O.data_ptr(),
            0,
            num_tokens,
            num_outputs,
            depth,
            x_TD.stride(0),
            weight_OD.stride(0),
            DTYPE_CODES[dtype],
            ordered,
            torch.get_num_threads(),
        )
    )
    return out_TO


def _torch_product(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """F.linear. A bf16 product is padded to a depth that oneDNN does not read beyond."""
    if x_TD.dtype is torch.bfloat16 and (missing := -x_TD.shape[-1] % _AMX_DEPTH):
        x_TD, weight_OD = (torch.nn.functional.pad(one, (0, missing)) for one in (x_TD, weight_OD))
    if x_TD.dim() == 2 and bias_O is None:  # a recording step decomposes matmul, and loads SymPy
        return x_TD.mm(weight_OD.t())
    return reference.linear.linear(x_TD, weight_OD, bias_O)


def linear_int8(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
    *,
    ordered: bool = False,
) -> Tensor:
    """`reference.linear.linear_int8`; adds the residual in place.

    With few tokens the kernel streams the int8 weights. With many tokens and bf16, blocks of
    weights are widened to bf16 for torch's product, which rounds once more, before the scale;
    unless `ordered`, as for `_product`.
    """
    dtype = x_TD.dtype
    if (
        dtype not in (torch.float32, torch.bfloat16)
        or x_TD.dim() != 2
        or weight_OD.dtype is not torch.int8
        or weight_OD.stride(1) != 1
        or scale_O.dtype is not torch.float32
        or not scale_O.is_contiguous()
        or (bias_O is not None and (bias_O.dtype is not dtype or not bias_O.is_contiguous()))
        or not x_TD.numel()
    ):
        return reference.linear.linear_int8(x_TD, weight_OD, scale_O, bias_O, residual_TO)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    num_tokens, depth = x_TD.shape
    out_TO = x_TD.new_empty((num_tokens, weight_OD.shape[0]))
    widens = dtype is torch.bfloat16 and num_tokens >= _WIDEN_TOKENS and depth % _AMX_DEPTH == 0
    if widens and not ordered:
        _linear_widened(out_TO, x_TD, weight_OD, scale_O, bias_O)
    else:
        load().nanovllm_linear_int8(
            LINEAR.pack(
                out_TO.data_ptr(),
                x_TD.data_ptr(),
                weight_OD.data_ptr(),
                0 if bias_O is None else bias_O.data_ptr(),
                scale_O.data_ptr(),
                num_tokens,
                weight_OD.shape[0],
                depth,
                x_TD.stride(0),
                weight_OD.stride(0),
                DTYPE_CODES[dtype],
                ordered,
                torch.get_num_threads(),
            )
        )
    return out_TO if residual_TO is None else out_TO.add_(residual_TO)


def _linear_widened(
    out_TO: Tensor, x_TD: Tensor, weight_OD: Tensor, scale_O: Tensor, bias_O: Tensor | None
) -> None:
    depth = x_TD.shape[1]
    num_rows = max(64, _WIDEN_BYTES // (2 * depth) // 64 * 64)
    widened_OD = torch.empty((min(num_rows, weight_OD.shape[0]), depth), dtype=torch.bfloat16)
    for first in range(0, weight_OD.shape[0], num_rows):
        part_OD = weight_OD[first : first + num_rows]
        rows, end = part_OD.shape[0], first + part_OD.shape[0]
        load().nanovllm_widen_int8(
            WIDEN.pack(
                widened_OD.data_ptr(),
                part_OD.data_ptr(),
                rows,
                depth,
                part_OD.stride(0),
                torch.get_num_threads(),
            )
        )
        sum_TO = (
            torch.nn.functional.linear(x_TD, widened_OD[:rows]).float().mul_(scale_O[first:end])
        )
        out_TO[:, first:end] = sum_TO if bias_O is None else sum_TO.add_(bias_O[first:end])
