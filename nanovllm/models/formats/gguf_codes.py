"""From blocks of GGUF files to `PackedWeight`.

Types with codes of 4 and 8 bits always become codes. Others, of 2, 3, 5 and 6 bits, do so for
devices without products of their blocks, in codes of 4 or 8 bits. A scale is for 32 columns, or
for 16 as in the file. Those of types with K and of IQ4_XS are products of two numbers: they are
rounded to fp16, by 1/2048 of their value at most, since in fp32 they would take a quarter of the
weight.
All other scales are as the file has them.
O outputs | D depth | n blocks in a row | g = 32 columns of a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.reference import ggml
from nanovllm.kernels.reference.ggml import (
    Q2_K,
    Q3_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    half,
    shifted,
    six_bits,
)
from nanovllm.kernels.reference.packed import E2M1, e2m1_table, pack
from nanovllm.models.formats import gguf_random
from nanovllm.models.formats.fp4 import powers
from nanovllm.models.formats.packed_weight import PackedWeight

GROUP = 32
CONVERTED_BYTES = 1 << 20  # of blocks that are converted at a time
Q4_0, Q4_1, Q8_0, Q4_K, IQ4_NL, IQ4_XS, MXFP4 = 2, 3, 8, 12, 20, 23, 39
IQ4_LEVELS = (
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
)  # fmt: skip


class Codes(NamedTuple):
    """`zero` is the code of 0; None: the offset is the file's minimum, or there is a table."""

    bits: int
    zero: int | None = None
    has_minimum: bool = False
    levels: tuple[float, ...] = ()
    scale_dtype: torch.dtype = torch.float16
    group: int = GROUP

    @property
    def has_offset(self) -> bool:
        return self.has_minimum or self.zero is not None

    def table(self, device: torch.device | str) -> Tensor | None:
        if not self.levels:
            return None
        if self.levels == E2M1:
            return e2m1_table(device)
        return torch.tensor(self.levels, dtype=torch.float32, device=device)


CODES: dict[int, Codes] = {
    Q4_0: Codes(4, zero=8),
    Q4_1: Codes(4, has_minimum=True),
    Q8_0: Codes(8, zero=128),
    Q4_K: Codes(4, has_minimum=True),
    IQ4_NL: Codes(4, levels=IQ4_LEVELS),
    IQ4_XS: Codes(4, levels=IQ4_LEVELS),
    MXFP4: Codes(4, levels=E2M1, scale_dtype=torch.bfloat16),  # powers of 2, from 2^-127
}
# of types whose blocks some devices keep
BLOCK_CODES: dict[int, Codes] = {
    Q5_0: Codes(8, zero=16),
    Q5_1: Codes(8, has_minimum=True),
    Q2_K: Codes(4, has_minimum=True, group=16),
    Q3_K: Codes(4, zero=4, group=16),
    Q5_K: Codes(8, has_minimum=True),
    Q6_K: Codes(8, zero=32, group=16),
}
ALL_CODES = CODES | BLOCK_CODES


def of_blocks(block_OnB: Tensor, ggml_type: int) -> PackedWeight:
    """The weight in blocks [O, n, bytes]. Raises ValueError for a scale that is no number.

    Some rows are converted at a time, so that little memory is needed beside the blocks and the
    weight.
    """
    num_rows = len(block_OnB)
    step = max(1, CONVERTED_BYTES // max(1, block_OnB[:1].nbytes))
    first = _of_rows(block_OnB[:step], ggml_type)
    if step >= num_rows:
        return first
    tensors: dict[str, Any] = {
        name: one.new_empty((num_rows, *one.shape[1:]))
        for name, one in first._asdict().items()
        if isinstance(one, Tensor) and name != "table"
    }
    for begin in range(0, num_rows, step):
        rows = slice(begin, min(begin + step, num_rows))
        part = first if begin == 0 else _of_rows(block_OnB[rows], ggml_type)
        for name, out in tensors.items():
            out[rows] = getattr(part, name)
    return first._replace(**tensors)


def _of_rows(block: Tensor, ggml_type: int) -> PackedWeight:
    codes, minimum = ALL_CODES[ggml_type], None
    if ggml_type in BLOCK_CODES:
        parts = ggml.TYPES[ggml_type].parts(block)
        code, scale = pack(parts.code.flatten(-2), codes.bits), parts.scale.flatten(-2)
        minimum = None if parts.minimum is None else -parts.minimum.flatten(-2)
    elif ggml_type == Q4_K:
        code, scale, minimum = _q4_k(block)
    elif ggml_type == IQ4_XS:
        code, scale = _iq4_xs(block)
    elif ggml_type == MXFP4:
        code, scale = block[..., 1:].flatten(-2), powers(block[..., 0])
    else:
        num = 4 if codes.has_minimum else 2
        scale = half(block[..., :2]).squeeze(-1)
        minimum = half(block[..., 2:4]).squeeze(-1) if codes.has_minimum else None
        code = block[..., num:].flatten(-2)
        code = code ^ 128 if codes.bits == 8 else code  # a signed number, plus 128
    return _weight(code, scale, minimum, codes)


def quantized(weight_OD: Tensor, ggml_type: int) -> PackedWeight:
    """A matrix in fp32 by the smallest and largest numbers of its groups."""
    if ggml_type in BLOCK_CODES:
        block = gguf_random.to_blocks(weight_OD, ggml_type)
        return of_blocks(block.unflatten(-1, (-1, ggml.TYPES[ggml_type].num_bytes)), ggml_type)
    codes, group = CODES[ggml_type], weight_OD.unflatten(-1, (-1, GROUP))
    largest, top = group.abs().amax(-1), 2**codes.bits - 1
    if codes.levels:
        scale = (largest / max(codes.levels)).to(codes.scale_dtype).float()
        level, order = torch.tensor(codes.levels, dtype=torch.float32).sort()
        bounds = ((level[1:] + level[:-1]) / 2).to(group.device)
        found = torch.bucketize(group / _above_0(scale), bounds)
        return _weight(pack(order.to(group.device)[found].flatten(-2), 4), scale, None, codes)
    minimum = None
    if codes.has_minimum:
        minimum = group.amin(-1)
        scale = (group.amax(-1) - minimum) / top
        found = ((group - minimum.unsqueeze(-1)) / _above_0(scale)).round()
    else:
        assert codes.zero is not None
        scale = largest / (codes.zero - 1)
        found = (group / _above_0(scale)).round() + codes.zero
    code = pack(found.clamp(0, top).flatten(-2), codes.bits)
    return _weight(code, scale, minimum, codes)


def check_finite(number: Tensor) -> None:
    """Raise ValueError for a scale that is no number."""
    if not number.isfinite().all():
        raise ValueError("a scale is NaN, infinite or too large")


def _weight(code: Tensor, scale: Tensor, minimum: Tensor | None, codes: Codes) -> PackedWeight:
    scale = scale.to(codes.scale_dtype)
    offset = None if minimum is None else minimum.to(codes.scale_dtype)
    if codes.zero is not None:
        offset = scale * -codes.zero  # a power of 2: exact
    for one in (scale, offset):
        if one is not None:
            check_finite(one)
    depth, table = scale.shape[-1] * codes.group, codes.table(code.device)
    sizes = codes.bits, codes.group, depth
    return PackedWeight(code.contiguous(), scale, offset, table, None, *sizes)


def _q4_k(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minima. 32 bytes have the codes of two groups: their lower halves those of
    the first one."""
    d, d_min, packed, low = block.split([2, 2, 12, 128], -1)
    scale, minimum = six_bits(packed)
    two = low.unflatten(-1, (4, 2, 16))  # groups' pairs | columns 0 … 15, 16 … 31 | columns
    first = (two[..., 0, :] & 15) | (two[..., 1, :] << 4)
    second = (two[..., 0, :] >> 4) | (two[..., 1, :] & 240)
    code = torch.stack((first, second), -2).flatten(-4)
    scales = (half(d) * scale.float()).flatten(-2)
    return code, scales, -(half(d_min) * minimum.float()).flatten(-2)


def _iq4_xs(block: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales, whose upper two bits of six follow each other in two bytes."""
    d, high, low, code = block.split([2, 2, 4, 128], -1)
    scale = shifted(low, 1, 4) | (shifted(high, 1, 2) << 4)
    return code.flatten(-2), (half(d) * (scale.float() - 32.0)).flatten(-2)


def _above_0(scale: Tensor) -> Tensor:
    return scale.where(scale > 0, 1.0).unsqueeze(-1)
