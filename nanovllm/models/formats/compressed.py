"""Integers of the library compressed-tensors: words of 4 or 8 bits (pack-quantized), and int8
(int-quantized, naive-quantized).

O outputs | D depth | G groups of inputs. The scales are [O, G], [O, 1] of channels or [1] of the
whole tensor, and zeros the same. Inputs of products are not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.models.formats.format import Axis, Companion, Extent, Piece
from nanovllm.models.formats.grouped import WORD_BITS, of_words
from nanovllm.models.formats.packed_format import Layout, PackedFormat, some_columns
from nanovllm.models.formats.packed_weight import PackedWeight

UNREAD = ("weight_shape", "input_scale", "input_zero_point", "input_global_scale", "output_scale")
TENSOR, CHANNEL = 0, -1  # in the place of the inputs of a group


def unread(*names: str) -> dict[str, Companion]:
    """Tensors that may be there and are not needed: of inputs, which are not quantized, say."""
    return {name: Companion((), torch.float32, is_optional=True, is_unread=True) for name in names}


@dataclass(frozen=True)
class Integers(PackedFormat):
    """`inputs` share a scale; CHANNEL: all inputs of an output, TENSOR: all of the matrix. If a
    matrix `has_order`, its `weight_g_idx` names the group of each input."""

    bits: int
    inputs: int
    symmetric: bool = True
    has_order: bool = False
    name: ClassVar[str] = "compressed-tensors"

    @property
    def half(self) -> int:
        """What a number is larger by as it is stored here, where it has no sign."""
        return int(2 ** (self.bits - 1))

    @property
    def layout(self) -> Layout:
        is_half = self.symmetric and self.inputs > 0
        dtype = torch.float16 if is_half else torch.float32
        return Layout(self.bits, self.inputs or -1, has_order=self.has_order, scale_dtype=dtype)

    def numbers(self, shape: tuple[int, int], dtype: torch.dtype, row_block: int = 1) -> Companion:
        """Scales or zeros of all groups."""
        if self.inputs == TENSOR:
            return Companion((), dtype)
        group = shape[1] if self.inputs == CHANNEL else self.inputs
        return Companion((Axis("rows", row_block), Axis("columns", group, self.has_order)), dtype)

    def codes_and_scales(self, shape: tuple[int, int]) -> dict[str, Companion]:
        g_idx = {"weight_g_idx": Companion((Axis("columns"),), torch.int32)}
        found = {"weight_scale": self.numbers(shape, torch.float32)}
        return {**found, **(g_idx if self.has_order else unread("weight_g_idx")), **unread(*UNREAD)}

    def stored(
        self,
        raw: Mapping[str, Tensor],
        code_OD: Tensor,
        zero_OG: Tensor | None,
        piece: Piece,
        extent: Extent,
    ) -> PackedWeight:
        """From codes and zeros without signs; no zeros: half of all codes."""
        scale_OG = self.of_outputs(raw["weight_scale"], piece)
        if zero_OG is None:
            zero_OG = torch.full_like(scale_OG, self.half)
        group_D = raw.get("weight_g_idx")
        return self.grouped(code_OD, scale_OG, zero_OG, group_D, piece, extent)

    def of_outputs(self, found: Tensor, piece: Piece) -> Tensor:
        return found.view(1, 1).expand(piece.size[0], 1) if self.inputs == TENSOR else found


@dataclass(frozen=True)
class PackedIntegers(Integers):
    """`weight_packed` [O, D / 8] and `weight_zero_point` [O / 8, G] are words of 32 bits. There are
    no zeros of whole tensors."""

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        axes = (Axis("rows"), Axis("columns", self.per_word))
        zeros = {"weight_zero_point": self.numbers(shape, torch.int32, self.per_word)}
        return {
            "weight_packed": Companion(axes, torch.int32),
            **(unread("weight_zero_point") if self.symmetric else zeros),
            **self.codes_and_scales(shape),
        }

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> PackedWeight:
        words, zero_OG = of_words(raw["weight_packed"], self.bits), None
        code_OD = some_columns(words, piece, Axis("columns", self.per_word))
        if not self.symmetric:
            zero_GO = of_words(raw["weight_zero_point"].T.contiguous(), self.bits)
            first = piece.rows.start % self.per_word
            zero_OG = zero_GO.narrow(1, first, piece.size[0]).T
        return self.stored(raw, code_OD, zero_OG, piece, extent)


@dataclass(frozen=True)
class Int8s(Integers):
    """`weight` [O, D] and `weight_zero_point` are int8."""

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        zeros = {"weight_zero_point": self.numbers(shape, torch.int8)}
        return {
            "weight": Companion((Axis("rows"), Axis("columns")), torch.int8),
            **(unread("weight_zero_point") if self.symmetric else zeros),
            **self.codes_and_scales(shape),
        }

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> PackedWeight:
        zero_OG = None
        if not self.symmetric:
            zero_OG = self.of_outputs(raw["weight_zero_point"].int(), piece) + self.half
        return self.stored(raw, raw["weight"].int() + self.half, zero_OG, piece, extent)
