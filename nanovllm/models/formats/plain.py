"""Plain weights: one tensor in the model's dtype. O outputs | D depth | T tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.models.formats.format import Extent, Format


@dataclass(frozen=True)
class Plain(Format):
    name: ClassVar[str] = "plain"

    @property
    def is_plain(self) -> bool:
        return True

    def empty(self, extent: Extent, device: torch.device | str) -> Tensor:
        return torch.empty(extent.shape, dtype=extent.dtype, device=device)

    def quantized(self, name: str, weight_OD: Tensor, extent: Extent) -> Tensor:
        """The weight itself, not a copy."""
        return weight_OD


PLAIN = Plain()
