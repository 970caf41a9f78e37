"""Writes the blocks of `reference.ggml`, for random weights: one scale for all columns of a block.

A file's own blocks have better scales: this is no way to quantize a model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm.kernels.reference.ggml import Q2_K, Q3_K, Q5_0, Q5_1, Q5_K, Q6_K, TYPES


def to_blocks(weight_OD: Tensor, ggml_type: int) -> Tensor:
    """The blocks [O, B] of a matrix in fp32. Each number is at most half a step off."""
    block = weight_OD.unflatten(-1, (-1, TYPES[ggml_type].columns))
    has_minimum = len(TYPES[ggml_type].halves) == 2
    num_levels = {Q2_K: 4, Q3_K: 8, Q6_K: 64}.get(ggml_type, 32)
    low = block.amin(-1, keepdim=True).clamp(max=0.0)
    if has_minimum:
        d, zero = (block.amax(-1, keepdim=True) - low) / (num_levels - 1), low
    else:
        d = block.abs().amax(-1, keepdim=True) / (num_levels // 2 - 1)
        zero = -d * (num_levels // 2)
    code = ((block - zero) / d.where(d > 0, 1.0)).round().clamp(0, num_levels - 1).to(torch.uint8)
    return WRITERS[ggml_type](code, _half(d), _half(-low)).flatten(-2)


def _half(number: Tensor) -> Tensor:
    return number.half().contiguous().view(torch.uint8)


def _q5_0(code: Tensor, d: Tensor, minus_low: Tensor) -> Tensor:
    return torch.cat((d, _joined(code >> 4, 1, 1), _joined(code & 15, 16, 4)), -1)


def _q5_1(code: Tensor, d: Tensor, minus_low: Tensor) -> Tensor:
    low = _half(-minus_low.view(torch.float16))
    return torch.cat((d, low, _joined(code >> 4, 1, 1), _joined(code & 15, 16, 4)), -1)


def _q2_k(code: Tensor, d: Tensor, minus_low: Tensor) -> Tensor:
    return torch.cat((_filled(code, 16, 0x11), _joined(code, 32, 2), d, minus_low), -1)


def _q3_k(code: Tensor, d: Tensor, minus_low: Tensor) -> Tensor:
    # all scales are 33, which stands for 1: 6 bits, the lower 4 of them in the first 8 bytes
    scale = torch.cat((_filled(code, 8, 0x11), _filled(code, 4, 0xAA)), -1)
    return torch.cat((_joined(code >> 2, 32, 1), _joined(code & 3, 32, 2), scale, d), -1)


def _q5_k(code: Tensor, d: Tensor, minus_low: Tensor) -> Tensor:
    scale = torch.cat((_filled(code, 8, 1), _filled(code, 4, 0x11)), -1)
    return torch.cat(
        (d, minus_low, scale, _joined(code >> 4, 32, 1), _joined(code & 15, 32, 4)), -1
    )


def _q6_k(code: Tensor, d: Tensor, minus_low: Tensor) -> Tensor:
    parts = _joined(code & 15, 64, 4), _joined(code >> 4, 32, 2), _filled(code, 16, 1), d
    return torch.cat(parts, -1)


WRITERS: dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    Q5_0: _q5_0, Q5_1: _q5_1, Q2_K: _q2_k, Q3_K: _q3_k, Q5_K: _q5_k, Q6_K: _q6_k,
}  # fmt: skip


def _filled(code: Tensor, num: int, value: int) -> Tensor:
    return code.new_full((*code.shape[:-1], num), value)


def _joined(code: Tensor, width: int, bits: int) -> Tensor:
    """Bytes of codes: see `reference.ggml.shifted`, or with a width of 1 its `_bits`."""
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=code.device).view(-1, 1)
    return (
        (code.unflatten(-1, (-1, 8 // bits, width)) << shift).sum(-2, dtype=torch.uint8).flatten(-2)
    )
