"""Matrices that a checkpoint stores in a format of its own, as plain tensors in the model's dtype:
for devices without products for that format. O outputs | D depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.models import formats
from nanovllm.models.formats.format import Companion, Extent, Format, Piece
from nanovllm.models.formats.plain import Plain


@dataclass(frozen=True)
class Dequantized(Plain):
    """Reads what `stored` reads, and keeps the real values, rounded once."""

    stored: Format
    name: ClassVar[str] = "dequantized"

    @property
    def is_packed(self) -> bool:
        return True

    def refusal(self, extent: Extent) -> str | None:
        return self.stored.refusal(extent)

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        return self.stored.companions(shape)

    def companion_name(self, source: str, end: str) -> str:
        return self.stored.companion_name(source, end)

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> Tensor:
        return formats.rows(self.stored.read(raw, piece, extent), 0).to(extent.dtype)

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(pieces))

    def reordered(self, weight: Tensor, order_O: Tensor) -> Tensor:
        return weight[order_O]

    def scaled(self, weight: Tensor, factor: float) -> Tensor:
        return (weight.float() * factor).to(weight.dtype)
