"""How the weights of linear layers are stored: one file per format, and the registry of formats.

To add a format, write a file that provides `Format` and enter it in `FORMATS`.
O outputs | D depth | T tokens.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from nanovllm.models.formats import int8, plain

# A stored weight: a tensor, or a named tuple of tensors that only its format understands.
Weight: TypeAlias = Tensor | tuple[Tensor, ...]


class Format(Protocol):
    """What the file of a format provides."""

    @property
    def Stored(self) -> type:
        """The type of a stored weight, which no other format uses."""

    def store(self, name: str, weight_OD: Tensor) -> Any:
        """Convert a weight in the model's dtype; `name` is for error messages."""

    def num_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of a stored weight of `shape` in a model of `dtype`."""

    def linear(
        self, x_TD: Tensor, weight: Any, bias_O: Tensor | None, residual_TO: Tensor | None
    ) -> Tensor:
        """x · weightᵀ + bias + residual: [T, O] in the dtype of x."""

    def rows(self, weight: Any, first: int) -> Tensor:
        """The real values of the weight's rows from `first` on, in fp32."""


PLAIN = "plain"  # the format of weights that the options leave as they are
FORMATS: dict[str, Format] = {PLAIN: plain, "int8": int8}


def format_of(weight: Weight) -> Format:
    """The format that stored this weight."""
    return next(one for one in FORMATS.values() if isinstance(weight, one.Stored))


def linear(
    x_TD: Tensor, weight: Weight, bias_O: Tensor | None, residual_TO: Tensor | None = None
) -> Tensor:
    """x · weightᵀ + bias + residual, for a weight in any format: [T, O] in the dtype of x."""
    return format_of(weight).linear(x_TD, weight, bias_O, residual_TO)


def rows(weight: Weight, first: int) -> Tensor:
    """The real values of the weight's rows from `first` on, in fp32."""
    return format_of(weight).rows(weight, first)
