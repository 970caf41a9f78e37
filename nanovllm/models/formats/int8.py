"""Weight-only quantization to int8 with one scale per output. O outputs | D depth | T tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.formats.format import Extent, Format

# Quantizing takes a few times the memory of its rows, and a head has 150,000 rows.
ROWS_AT_ONCE = 4096


class Int8Weight(NamedTuple):
    """weight ≈ values · scale: integers from −127 to 127, and fp32 scales."""

    values_OD: Tensor
    scale_O: Tensor

    def linear(self, x_TD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
        return ops.linear_int8(x_TD, self.values_OD, self.scale_O, bias_O, residual_TO)

    def rows(self, first: int) -> Tensor:
        return self.values_OD[first:].float() * self.scale_O[first:, None]


@dataclass(frozen=True)
class Int8(Format):
    name: ClassVar[str] = "int8"

    def empty(self, extent: Extent, device: torch.device | str) -> Int8Weight:
        values_OD = torch.empty(extent.shape, dtype=torch.int8, device=device)
        return Int8Weight(values_OD, values_OD.new_empty(extent.shape[:-1], dtype=torch.float32))

    def quantized(self, name: str, weight_OD: Tensor, extent: Extent) -> Int8Weight:
        """Round to the nearest multiple of each row's scale: the row's largest magnitude / 127.

        No value is off by more than half of its row's scale. Raises ValueError, with the name, for
        a weight that holds NaN or infinity.
        """
        values_OD, scale_O = self.empty(extent, weight_OD.device)
        parts = zip(*(tensor.split(ROWS_AT_ONCE) for tensor in (weight_OD, values_OD, scale_O)))
        for part_OD, part_values_OD, part_scale_O in parts:
            part_scale_O.copy_(part_OD.abs().amax(1).float() / 127)
            if not part_scale_O.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity and cannot be quantized")
            divisor_O = torch.where(part_scale_O == 0, 1.0, part_scale_O)  # a row of zeros
            rounded_OD = (part_OD.float() / divisor_O.unsqueeze(1)).round_()
            part_values_OD.copy_(rounded_OD.clamp_(-127, 127))
        return Int8Weight(values_OD, scale_O)
