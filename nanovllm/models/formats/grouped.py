"""4 or 8 bits with a scale and a zero for each group of inputs: checkpoints of GPTQ and AWQ.

Products dequantize. Both kinds of checkpoints have words of 32 bits: `qweight` [D / 8, O] of inputs
(GPTQ) or [D, O / 8] of outputs (AWQ), and `qzeros` [G, O / 8] of outputs.
O outputs | D depth | B bytes of a row | G groups of inputs | T tokens | K experts per token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.formats.format import Axis, Companion, Extent, Format, Piece, spread

WORD_BITS = 32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where output i of a word is


class GroupedWeight(NamedTuple):
    """weight = (value − zero) · scale of the input's group.

    Bytes hold one value, or two: the lower bits are those of the input before. A group has `group`
    inputs; 0 if `group_D` names the group of each input.
    """

    values_OB: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    group_D: Tensor | None
    bits: int
    depth: int
    group: int

    def real(self, dtype: torch.dtype) -> Tensor:
        """All numbers [.., O, D]."""
        value_OD = _of_bytes(self.values_OB, self.bits)[..., : self.depth].float()
        return ((value_OD - self._of_inputs(self.zero_OG)) * self._of_inputs(self.scale_OG)).to(
            dtype
        )

    def linear(self, x_TD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
        return ops.linear(x_TD, self.real(x_TD.dtype), bias_O, residual_TO)

    def rows(self, first: int) -> Tensor:
        return self.real(torch.float32)[first:]

    def expert_linear(self, x: Tensor, expert_TK: Tensor) -> Tensor:
        return ops.expert_linear(x, expert_TK, self.real(x.dtype))

    def _of_inputs(self, x_OG: Tensor) -> Tensor:
        if self.group_D is None:
            return spread(x_OG, self.group, self.depth, -1)
        if self.group_D.dim() == 1:
            return x_OG.index_select(-1, self.group_D)
        index_EOD = self.group_D.unsqueeze(1).long().expand(*x_OG.shape[:2], -1)
        return x_OG.gather(-1, index_EOD)  # experts have an order each


@dataclass(frozen=True)
class Grouped(Format):
    """A `group` of −1 is all inputs. Zeros are larger by `zero_offset` than they are stored. If a
    matrix `has_order`, its `g_idx` names the group of each input, any of its groups."""

    bits: int
    group: int
    zero_offset: int = 0
    has_order: bool = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "experts"})

    @property
    def is_packed(self) -> bool:
        return True

    @property
    def joins_sources(self) -> bool:
        return not self.has_order

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    def empty(self, extent: Extent, device: torch.device | str) -> GroupedWeight:
        *outer, depth = extent.shape
        values = torch.empty(*outer, -(-depth * self.bits // 8), dtype=torch.uint8, device=device)
        order, group = None, self._group(extent)
        num_groups = -(-depth // (group or self.group))
        if self.has_order:
            num_groups = -(-extent.all_columns // self.group)
            order = values.new_empty((*outer[:-1], depth), dtype=torch.int32)
        scale = values.new_empty((*outer, num_groups), dtype=torch.float32)
        zero = torch.empty_like(scale, dtype=torch.int16)
        return GroupedWeight(values, scale, zero, order, self.bits, depth, group)

    def quantized(self, name: str, weight_OD: Tensor, extent: Extent) -> GroupedWeight:
        """By the smallest and largest numbers of groups. With an order, inputs are in order."""
        stored = self.empty(extent, weight_OD.device)
        depth, group, largest = weight_OD.shape[1], stored.group or self.group, 2**self.bits - 1
        padded = torch.nn.functional.pad(weight_OD.float(), (0, -depth % group))
        grouped_OGg = padded.unflatten(-1, (-1, group))
        low, high = grouped_OGg.amin(-1).clamp(max=0.0), grouped_OGg.amax(-1).clamp(min=0.0)
        scale_OG = ((high - low) / largest).clamp(min=1e-12)
        if not scale_OG.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, so that it cannot be quantized")
        zero_OG = (-low / scale_OG).round()
        value = (grouped_OGg / scale_OG.unsqueeze(-1)).round() + zero_OG.unsqueeze(-1)
        value_OD = value.clamp(0, largest).flatten(-2)[:, :depth].to(torch.uint8)
        num = scale_OG.shape[1]
        stored.scale_OG.fill_(1.0)[:, :num] = scale_OG
        stored.zero_OG.zero_()[:, :num] = zero_OG.to(torch.int16)
        if stored.group_D is not None:
            stored.group_D.copy_(torch.arange(depth, device=weight_OD.device) // group)
        return stored._replace(values_OB=_to_bytes(value_OD, self.bits))

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        group = shape[1] if self.group < 0 else self.group
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

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> GroupedWeight:
        if not raw["scales"].isfinite().all():
            raise ValueError("a scale is NaN or infinite")
        (num_rows, depth), order = piece.size, raw.get("g_idx")
        first_row, group = piece.rows.start % self.per_word, self._group(extent)
        zero_GO = self._numbers(raw["qzeros"]).narrow(1, first_row, num_rows) + self.zero_offset
        scale_OG, zero_OG = raw["scales"].T, zero_GO.to(torch.int16).T
        if order is not None:
            if order.min() < 0 or order.max() >= scale_OG.shape[1]:
                raise ValueError("g_idx names a group that is not there")
        elif self.group > 0:
            first = piece.columns.start % self.group // group
            scale_OG, zero_OG = (
                spread(x, self.group // group, None, 1).narrow(1, first, -(-depth // group))
                for x in (scale_OG, zero_OG)
            )
        values_OB = _to_bytes(self._values(raw["qweight"], piece).to(torch.uint8), self.bits)
        parts = scale_OG.contiguous(), zero_OG.contiguous(), order
        return GroupedWeight(values_OB, *parts, self.bits, depth, group)

    def scaled(self, weight: GroupedWeight, factor: float) -> GroupedWeight:
        return weight._replace(scale_OG=weight.scale_OG * factor)

    def reordered(self, weight: GroupedWeight, order_O: Tensor) -> GroupedWeight:
        """`group_D` has no rows."""
        values_OB, scale_OG, zero_OG = (one[order_O] for one in weight[:3])
        return weight._replace(values_OB=values_OB, scale_OG=scale_OG, zero_OG=zero_OG)

    def _group(self, extent: Extent) -> int:
        """The inputs of a group as stored, which is not cut."""
        if self.has_order:
            return 0
        return extent.shape[-1] if self.group < 0 else extent.column_block(self.group)

    def _numbers(self, words: Tensor) -> Tensor:
        """The numbers of words along the last axis."""
        return _unpacked(words, self.bits)

    @abstractmethod
    def _axes(self) -> tuple[Axis, Axis]:
        """Those of `qweight`."""

    @abstractmethod
    def _values(self, words: Tensor, piece: Piece) -> Tensor:
        """The numbers of a piece, [O, D]."""


@dataclass(frozen=True)
class Gptq(Grouped):
    name: ClassVar[str] = "gptq"

    def _axes(self) -> tuple[Axis, Axis]:
        return Axis("columns", self.per_word), Axis("rows")

    def _values(self, words: Tensor, piece: Piece) -> Tensor:
        first = piece.columns.start % self.per_word
        return self._numbers(words.T.contiguous()).narrow(1, first, piece.size[1])


@dataclass(frozen=True)
class Awq(Grouped):
    name: ClassVar[str] = "awq"

    def _numbers(self, words: Tensor) -> Tensor:
        order = torch.tensor(AWQ_ORDER, device=words.device)
        found = _unpacked(words, self.bits).unflatten(-1, (-1, self.per_word))
        return found[..., order].flatten(-2)

    def _axes(self) -> tuple[Axis, Axis]:
        return Axis("columns"), Axis("rows", self.per_word)

    def _values(self, words: Tensor, piece: Piece) -> Tensor:
        first = piece.rows.start % self.per_word
        return self._numbers(words).narrow(1, first, piece.size[0]).T


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The numbers of words along the last axis, the first one in the lowest bits."""
    shift = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shift) & (2**bits - 1)).flatten(-2)


def _to_bytes(value_OD: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return value_OD.contiguous()
    even = torch.nn.functional.pad(value_OD, (0, value_OD.shape[-1] % 2))
    return even[..., ::2] | (even[..., 1::2] << 4)


def _of_bytes(values_OB: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return values_OB
    return torch.stack((values_OB & 15, values_OB >> 4), -1).flatten(-2)
