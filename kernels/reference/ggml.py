"""Blocks of codes as GGUF files store them, and products with them. Shapes: see the package.

B bytes of a row of blocks | n blocks in a row

A row is a sequence of blocks of 32 or 256 columns. A block holds codes of 2 to 6 bits, and its
scales: numbers in fp16, and in blocks of 256 columns a small integer for each 16 or 32 of them. All
are little-endian. `TYPES` has the types by their numbers in GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.reference.experts import expert_linear
from nanovllm.kernels.reference.linear import linear

Q5_0, Q5_1, Q2_K, Q3_K, Q5_K, Q6_K = 6, 7, 10, 11, 13, 14


class Parts(NamedTuple):
    """What blocks hold: a value is (code − zero) · scale − minimum, those of the code's group.

    code [.., n, columns] uint8; scale and minimum [.., n, groups] in fp32.
    """

    code: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    zero: int = 0


class BlockType(NamedTuple):
    """`parts` takes blocks [.., n, num_bytes] apart.

    `halves` are the places of the numbers in fp16, by which all values of a block are multiplied
    or moved.
    """

    columns: int
    num_bytes: int
    parts: Callable[[Tensor], Parts]
    halves: tuple[int, ...]

    def unpack(self, block: Tensor) -> Tensor:
        """The values [.., n, columns] in fp32 of blocks [.., n, num_bytes]."""
        code, scale, minimum, zero = self.parts(block)
        group = (code.float() - zero).unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
        return (group if minimum is None else group - minimum.unsqueeze(-1)).flatten(-2)


def unpacked(block_OB: Tensor, ggml_type: int) -> Tensor:
    """The real values [.., O, D] in fp32 of rows of blocks [.., O, B]."""
    one = TYPES[ggml_type]
    return one.unpack(block_OB.unflatten(-1, (-1, one.num_bytes))).flatten(-2)


def depth_of(block_OB: Tensor, ggml_type: int) -> int:
    """The columns of rows of blocks."""
    one = TYPES[ggml_type]
    return block_OB.shape[-1] // one.num_bytes * one.columns


def ggml_lookup(row_T: Tensor, block_VB: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    """Rows [T, D] of a table [V, D] in blocks."""
    return unpacked(block_VB[row_T], ggml_type).to(dtype)


def ggml_linear(
    x_TD: Tensor,
    block_OB: Tensor,
    ggml_type: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """x · weightᵀ + bias, then + residual; the sum is in fp32 and is rounded to x's dtype once."""
    bias = None if bias_O is None else bias_O.float()
    y_TO = linear(x_TD.float(), unpacked(block_OB, ggml_type), bias).to(x_TD.dtype)
    return y_TO if residual_TO is None else y_TO + residual_TO


def ggml_expert_linear(x: Tensor, expert_TK: Tensor, block_EOB: Tensor, ggml_type: int) -> Tensor:
    """`experts.expert_linear` with weights in blocks: [T, K, O]."""
    return expert_linear(x, expert_TK, unpacked(block_EOB, ggml_type))


def half(two_bytes: Tensor) -> Tensor:
    """Numbers in fp16, as fp32: [.., 2] to [.., 1]."""
    return two_bytes.contiguous().view(torch.float16).float()


def shifted(byte: Tensor, width: int, bits: int) -> Tensor:
    """Codes of `bits` bits. Of each run of `width` bytes, first the lowest bits of all bytes, then
    the next ones, and so on."""
    runs, mask = byte.contiguous().unflatten(-1, (-1, width)), 2**bits - 1
    # by numbers, not by a tensor of shifts: torch vectorises these
    return torch.stack([(runs >> shift) & mask for shift in range(0, 8, bits)], -2).flatten(-3)


def _q5_0(block: Tensor) -> Parts:
    d, high, low = block.split([2, 4, 16], -1)
    return Parts(shifted(low, 16, 4) | (_bits(high) << 4), half(d), zero=16)


def _q5_1(block: Tensor) -> Parts:
    d, m, high, low = block.split([2, 2, 4, 16], -1)
    return Parts(shifted(low, 16, 4) | (_bits(high) << 4), half(d), -half(m))


def _q2_k(block: Tensor) -> Parts:
    scale, low, d, d_min = block.split([16, 64, 2, 2], -1)
    scales = half(d) * (scale & 15).float(), half(d_min) * (scale >> 4).float()
    return Parts(shifted(low, 32, 2), *scales)


def _q3_k(block: Tensor) -> Parts:
    high, low, scale, d = block.split([32, 64, 12, 2], -1)
    scale_low, scale_high = shifted(scale[..., :8], 8, 4), shifted(scale[..., 8:], 4, 2)
    scales = half(d) * ((scale_low | (scale_high << 4)).float() - 32.0)
    return Parts(shifted(low, 32, 2) | (shifted(high, 32, 1) << 2), scales, zero=4)


def six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima of 8 groups in 12 bytes, 6 bits each."""
    first, second, third = packed.split(4, -1)
    scale = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), -1)
    minimum = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), -1)
    return scale, minimum


def _q5_k(block: Tensor) -> Parts:
    d, d_min, packed, high, low = block.split([2, 2, 12, 32, 128], -1)
    scale, minimum = six_bits(packed)
    code = shifted(low, 32, 4) | (shifted(high, 32, 1) << 4)
    return Parts(code, half(d) * scale.float(), half(d_min) * minimum.float())


def _q6_k(block: Tensor) -> Parts:
    low, high, scale, d = block.split([128, 64, 16, 2], -1)
    code = shifted(low, 64, 4) | (shifted(high, 32, 2) << 4)
    scales = half(d) * scale.contiguous().view(torch.int8).float()
    return Parts(code, scales, zero=32)


def _bits(byte: Tensor) -> Tensor:
    """The bits of bytes, the lowest one first."""
    shift = torch.arange(8, dtype=torch.uint8, device=byte.device)
    return ((byte.unsqueeze(-1) >> shift) & 1).flatten(-2)


TYPES: dict[int, BlockType] = {
    Q5_0: BlockType(32, 22, _q5_0, (0,)),
    Q5_1: BlockType(32, 24, _q5_1, (0, 2)),
    Q2_K: BlockType(256, 84, _q2_k, (80, 82)),
    Q3_K: BlockType(256, 110, _q3_k, (108,)),
    Q5_K: BlockType(256, 176, _q5_k, (0, 2)),
    Q6_K: BlockType(256, 210, _q6_k, (208,)),
}


def halves_of(block_OB: Tensor, ggml_type: int) -> Tensor:
    """A copy of the numbers in fp16 of all blocks: [.., n, numbers]."""
    one = TYPES[ggml_type]
    block = block_OB.unflatten(-1, (-1, one.num_bytes))
    return torch.cat([block[..., at : at + 2] for at in one.halves], -1).view(torch.float16)


def with_halves(block_OB: Tensor, ggml_type: int, half: Tensor) -> Tensor:
    """A copy of blocks with other numbers in fp16, in the order of `halves_of`."""
    one, out = TYPES[ggml_type], block_OB.clone()
    block, raw = out.unflatten(-1, (-1, one.num_bytes)), half.contiguous().view(torch.uint8)
    places: Sequence[int] = one.halves
    for i, at in enumerate(places):
        block[..., at : at + 2] = raw[..., 2 * i : 2 * i + 2]
    return out
