"""Weights that are rounded as they are read, or by `nanovllm quantize`: 4 and 8 bits without zeros.

O outputs | D depth | G groups of inputs | g inputs of a group | P scales that are tried.
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
# From 20 down, so many twentieths of a group's largest magnitude are tried as the largest code:
# larger magnitudes are clipped. With 4 bits a smaller step for all others lowers the error of most
# groups; with 8 bits of few.
NUM_CLIPPED = 9
# The search takes some 80 bytes for each of these weights. A CPU's cache holds few; on a GPU a
# step costs the host as much for few weights as for many.
AT_ONCE, AT_ONCE_ON_CPU = 2**21, 2**17


def rounded(
    name: str, weight_OD: Tensor, bits: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(codes [O, D], scales [O, G]): weight ≈ (code − 2^(bits − 1)) · scale, with scales in
    `dtype`. The last group may be shorter.

    Of a few scales, a group has the one with the smallest sum of squares of its errors. Raises
    ValueError, with the name, for a weight that holds NaN or infinity.
    """
    at_once = AT_ONCE_ON_CPU if weight_OD.device.type == "cpu" else AT_ONCE
    rows = max(1, at_once // weight_OD.shape[1])
    found = [_rounded(name, some, bits, group, dtype) for some in weight_OD.split(rows)]
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
    num = NUM_CLIPPED if bits == 4 else 1
    part_P11 = torch.arange(20, 20 - num, -1, device=weight_OD.device).view(-1, 1, 1) / 20
    scale_POG = largest_OG * part_P11 / (half - 0.5)
    scale_POG = scale_POG.clamp_(min=torch.finfo(dtype).tiny).to(dtype).float()
    best_OG = scale_POG[0] if num == 1 else _best(scale_POG, grouped_OGg, half)
    value = (weight_OD.float() / spread(best_OG, group, depth, 1)).round_().clamp_(-half, half - 1)
    return (value + half).to(torch.uint8), best_OG.to(dtype)


def _best(scale_POG: Tensor, grouped_OGg: Tensor, half: int) -> Tensor:
    """The scale of each group with the smallest sum of squares of its errors: the first of equal
    ones."""
    value = (grouped_OGg / scale_POG.unsqueeze(-1)).round_().clamp_(-half, half - 1)
    error_POG = value.mul_(scale_POG.unsqueeze(-1)).sub_(grouped_OGg).square_().sum(-1)
    return scale_POG.gather(0, error_POG.argmin(0, keepdim=True)).squeeze(0)


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
