"""4 or 8 bits with a scale and a zero for each group of inputs: checkpoints of GPTQ and AWQ.

Both have words of 32 bits: `qweight` [D / 8, O] of inputs (GPTQ) or [D, O / 8] of outputs (AWQ),
and `qzeros` [G, O / 8] of outputs.
O outputs | D depth | G groups of inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.models.formats.format import Axis, Companion, Extent, Piece
from nanovllm.models.formats.packed_format import Layout, PackedFormat, some_columns
from nanovllm.models.formats.packed_weight import PackedWeight

WORD_BITS = 32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where output i of a word is


@dataclass(frozen=True)
class Grouped(PackedFormat):
    """A group has so many `inputs`; −1 are all. Zeros are larger by `zero_offset` than they are
    stored. If a matrix `has_order`, its `g_idx` names the group of each input. All zeros of a
    `symmetric` checkpoint are half of all values, so that offsets are exact in fp16."""

    bits: int
    inputs: int
    zero_offset: int = 0
    has_order: bool = False
    symmetric: bool = False

    @property
    def layout(self) -> Layout:
        is_half = self.symmetric and self.inputs > 0
        dtype = torch.float16 if is_half else torch.float32
        return Layout(self.bits, self.inputs, has_order=self.has_order, scale_dtype=dtype)

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        group = shape[1] if self.inputs < 0 else self.inputs
        groups, words = Axis("columns", group, self.has_order), Axis("rows", self.per_word)
        g_idx = Companion((Axis("columns"),), torch.int32)
        if not self.has_order:
            g_idx = g_idx._replace(is_optional=True, is_unread=True)
        return {
            "qweight": Companion(self._axes(), torch.int32),
            "qzeros": Companion((groups, words), torch.int32),
            "scales": Companion((groups, Axis("rows")), torch.float32),
            "g_idx": g_idx,
        }

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> PackedWeight:
        first_row, num_rows = piece.rows.start % self.per_word, piece.size[0]
        zero_GO = self._numbers(raw["qzeros"]).narrow(1, first_row, num_rows) + self.zero_offset
        scale_OG, zero_OG, code_OD = raw["scales"].T, zero_GO.T, self._codes(raw["qweight"], piece)
        return self.grouped(code_OD, scale_OG, zero_OG, raw.get("g_idx"), piece, extent)

    @abstractmethod
    def _numbers(self, words: Tensor) -> Tensor:
        """The numbers of words along the last axis."""

    @abstractmethod
    def _axes(self) -> tuple[Axis, Axis]:
        """Those of `qweight`."""

    @abstractmethod
    def _codes(self, words: Tensor, piece: Piece) -> Tensor:
        """The numbers of a piece, [O, D]."""


@dataclass(frozen=True)
class Gptq(Grouped):
    name: ClassVar[str] = "gptq"

    def _numbers(self, words: Tensor) -> Tensor:
        return of_words(words, self.bits)

    def _axes(self) -> tuple[Axis, Axis]:
        return Axis("columns", self.per_word), Axis("rows")

    def _codes(self, words: Tensor, piece: Piece) -> Tensor:
        return some_columns(self._numbers(words.T.contiguous()), piece, self._axes()[0])


@dataclass(frozen=True)
class Awq(Grouped):
    name: ClassVar[str] = "awq"

    def _numbers(self, words: Tensor) -> Tensor:
        order = torch.tensor(AWQ_ORDER, device=words.device)
        found = of_words(words, self.bits).unflatten(-1, (-1, self.per_word))
        return found[..., order].flatten(-2)

    def _axes(self) -> tuple[Axis, Axis]:
        return Axis("columns"), Axis("rows", self.per_word)

    def _codes(self, words: Tensor, piece: Piece) -> Tensor:
        first = piece.rows.start % self.per_word
        return self._numbers(words).narrow(1, first, piece.size[0]).T


def of_words(words: Tensor, bits: int) -> Tensor:
    """The numbers of words along the last axis, the first one in the lowest bits."""
    shift = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shift) & (2**bits - 1)).flatten(-2)
