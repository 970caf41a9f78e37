"""Weights that are rounded as they are read, or by `nanovllm quantize`: 4 and 8 bits without zeros.

O outputs | D depth | G groups of inputs | g inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.models.formats.format import Extent, spread
from nanovllm.models.formats.packed_format import Layout, PackedFormat
from nanovllm.models.formats.packed_weight import PackedWeight

GROUP = 128
# Parts of a group's largest magnitude that become the largest code: larger ones are clipped. With
# 4 bits a smaller step for all others lowers the error of most groups; with 8 bits of few.
CLIPPED = tuple(1 - i / 20 for i in range(9))
ROWS_AT_ONCE = 1024  # the search takes several times the memory of its rows


def rounded(
    name: str, weight_OD: Tensor, bits: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(codes [O, D], scales [O, G]): weight ≈ (code − 2^(bits − 1)) · scale, with scales in
    `dtype`. The last group may be shorter.

    Of a few scales, a group has the one with the smallest sum of squares of its errors. Raises
    ValueError, with the name, for a weight that holds NaN or infinity.
    """
    found = [_rounded(name, some, bits, group, dtype) for some in weight_OD.split(ROWS_AT_ONCE)]
    codes, scales = zip(*found)
    return torch.cat(codes), torch.cat(scales)


def _rounded(
    name: str, weight_OD: Tensor, bits: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    depth, half = weight_OD.shape[1], 2 ** (bits - 1)
    padded = torch.nn.functional.pad(weight_OD.float(), (0, -depth % group))
    grouped_OGg = padded.unflatten(-1, (-1, group))
    largest_OG = grouped_OGg.abs().amax(-1)
    if not largest_OG.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity, so that it cannot be quantized")
    smallest = torch.finfo(dtype).tiny
    least_OG = torch.full_like(largest_OG, torch.inf)
    best_OG = torch.empty_like(largest_OG)
    for part in CLIPPED if bits == 4 else CLIPPED[:1]:
        scale_OG = (largest_OG * part / (half - 0.5)).clamp(min=smallest).to(dtype).float()
        value = (grouped_OGg / scale_OG.unsqueeze(-1)).round_().clamp_(-half, half - 1)
        error_OG = (value * scale_OG.unsqueeze(-1)).sub_(grouped_OGg).square_().sum(-1)
        best_OG = torch.where(error_OG < least_OG, scale_OG, best_OG)
        least_OG = torch.minimum(error_OG, least_OG)
    value = (weight_OD.float() / spread(best_OG, group, depth, 1)).round_().clamp_(-half, half - 1)
    return (value + half).to(torch.uint8), best_OG.to(dtype)


@dataclass(frozen=True)
class Rounded(PackedFormat):
    """The option "int4": groups of 128 inputs."""

    bits: int = 4
    name: ClassVar[str] = "int4"

    @property
    def is_packed(self) -> bool:
        return False

    @property
    def layout(self) -> Layout:
        return Layout(self.bits, GROUP, scale_dtype=torch.float16)

    def quantized(self, name: str, weight_OD: Tensor, extent: Extent) -> PackedWeight:
        group = self.group(extent)
        code_OD, scale_OG = rounded(name, weight_OD, self.bits, group, torch.float16)
        # a power of two times the scale: exact
        return self.packed(code_OD, scale_OG, -(2 ** (self.bits - 1)) * scale_OG, None, extent)
