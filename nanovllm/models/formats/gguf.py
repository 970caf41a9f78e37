"""Matrices of a GGUF file: rows of blocks, in the types that `gguf.types` lists.

Types with codes of 4 or 8 bits become `PackedWeight` (`GgufCodes`). The codes of the other types
have 2, 3, 5 or 6 bits, and stay in the file's blocks (`GgmlBlocks`, see `reference.ggml`) where the
device has products of these.
O outputs | D depth | B bytes of a row | n blocks in a row | E experts | T tokens
K experts per token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.models.formats import gguf_codes, gguf_random
from nanovllm.models.formats.format import Axis, Companion, Extent, Format, Piece
from nanovllm.models.formats.gguf_codes import ALL_CODES, CODES
from nanovllm.models.formats.packed_weight import PackedWeight
from nanovllm.models.gguf.types import NUMBERS, TYPES


class GgmlWeight(NamedTuple):
    """Rows of blocks [.., O, B] of the type with a number: see `reference.ggml.TYPES`."""

    block_OB: Tensor
    ggml_type: int

    def linear(self, x_TD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
        return ops.ggml_linear(x_TD, self.block_OB, self.ggml_type, bias_O, residual_TO)

    def rows(self, first: int) -> Tensor:
        return reference.ggml.unpacked(self.block_OB[first:], self.ggml_type)

    def lookup(self, row_T: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.ggml_lookup(row_T, self.block_OB, self.ggml_type, dtype)

    def expert_linear(self, x: Tensor, expert_TK: Tensor) -> Tensor:
        return ops.ggml_expert_linear(x, expert_TK, self.block_OB, self.ggml_type)


@dataclass(frozen=True)
class Gguf(Format):
    """A tensor of a GGUF file, of the type with a name."""

    type_name: str
    name: ClassVar[str] = "gguf"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "experts", "table"})

    @property
    def is_packed(self) -> bool:
        return True

    @property
    def ggml_type(self) -> int:
        return NUMBERS[self.type_name]

    def refusal(self, extent: Extent) -> str | None:
        columns = TYPES[self.ggml_type].columns
        if extent.all_columns % columns or extent.column_block(columns) != columns:
            return f"a block of the type {self.type_name} has {columns} columns, and cannot be cut"
        return None

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        _, columns, num_bytes, _ = TYPES[self.ggml_type]
        blocks = Axis("columns", columns, width=num_bytes)
        return {"weight": Companion((Axis("rows"), blocks), torch.uint8)}

    def companion_name(self, source: str, end: str) -> str:
        """A matrix is one tensor, which also for experts has the name of its source."""
        return source

    def quantized(self, name: str, weight_OD: Tensor, extent: Extent) -> PackedWeight | GgmlWeight:
        if not weight_OD.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, so that it cannot be quantized")
        return self._quantized(weight_OD.float())

    @abstractmethod
    def _quantized(self, weight_OD: Tensor) -> PackedWeight | GgmlWeight:
        """Convert a matrix in fp32."""


@dataclass(frozen=True)
class GgufCodes(Gguf):
    """A type whose codes become those of `PackedWeight`."""

    def empty(self, extent: Extent, device: torch.device | str) -> PackedWeight:
        codes, (*outer, depth) = ALL_CODES[self.ggml_type], extent.shape
        num_bytes = depth if codes.bits == 8 else depth // 2
        code = torch.empty((*outer, num_bytes), dtype=torch.uint8, device=device)
        scale = code.new_empty((*outer, depth // codes.group), dtype=codes.scale_dtype)
        offset = scale.new_empty(scale.shape) if codes.has_offset else None
        table = codes.table(device)
        return PackedWeight(code, scale, offset, table, None, codes.bits, codes.group, depth)

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> PackedWeight:
        block = raw["weight"].unflatten(-1, (-1, TYPES[self.ggml_type].num_bytes))
        return gguf_codes.of_blocks(block, self.ggml_type)

    def joined(self, pieces: Sequence[PackedWeight]) -> PackedWeight:
        """All pieces have the same table."""
        table = pieces[0].table
        found: PackedWeight = super().joined([one._replace(table=None) for one in pieces])
        return found._replace(table=table)

    def reordered(self, weight: PackedWeight, order_O: Tensor) -> PackedWeight:
        found: PackedWeight = super().reordered(weight._replace(table=None), order_O)
        return found._replace(table=weight.table)

    def scaled(self, weight: PackedWeight, factor: float) -> PackedWeight:
        """The factor goes to scales and offsets, which are rounded to their dtype."""
        offset = weight.offset_OG
        return weight._replace(
            scale_OG=_times(weight.scale_OG, factor),
            offset_OG=None if offset is None else _times(offset, factor),
        )

    def _quantized(self, weight_OD: Tensor) -> PackedWeight:
        return gguf_codes.quantized(weight_OD, self.ggml_type)


@dataclass(frozen=True)
class GgmlBlocks(Gguf):
    """A type whose blocks stay as they are."""

    def empty(self, extent: Extent, device: torch.device | str) -> GgmlWeight:
        _, columns, num_bytes, _ = TYPES[self.ggml_type]
        *outer, depth = extent.shape
        shape = (*outer, depth // columns * num_bytes)
        return GgmlWeight(torch.empty(shape, dtype=torch.uint8, device=device), self.ggml_type)

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> GgmlWeight:
        """The file's own bytes, not a copy."""
        gguf_codes.check_finite(reference.ggml.halves_of(raw["weight"], self.ggml_type))
        return GgmlWeight(raw["weight"], self.ggml_type)

    def scaled(self, weight: GgmlWeight, factor: float) -> GgmlWeight:
        """The factor goes to the numbers in fp16, which are rounded to that."""
        half = _times(reference.ggml.halves_of(*weight), factor)
        return weight._replace(block_OB=reference.ggml.with_halves(*weight, half))

    def _quantized(self, weight_OD: Tensor) -> GgmlWeight:
        return GgmlWeight(gguf_random.to_blocks(weight_OD, self.ggml_type), self.ggml_type)


def of_type(name: str, *, keeps_blocks: bool = True) -> Gguf:
    """The format of a type with codes. Raises ValueError for another one."""
    number = NUMBERS.get(name)
    if number in CODES or (number in ALL_CODES and not keeps_blocks):
        return GgufCodes(name)
    if number in reference.ggml.TYPES:
        return GgmlBlocks(name)
    known = [TYPES[one].name for one in (*CODES, *reference.ggml.TYPES)]
    raise ValueError(f"the type {name!r} is not supported: only {', '.join(known)} are")


def real_values(raw_OB: Tensor, type_name: str) -> Tensor:
    """The numbers of rows of blocks, in fp32."""
    number = NUMBERS[type_name]
    if number not in CODES:
        return reference.ggml.unpacked(raw_OB, number)
    block = raw_OB.unflatten(-1, (-1, TYPES[number].num_bytes))
    return gguf_codes.of_blocks(block, number).rows(0)


def _times(number: Tensor, factor: float) -> Tensor:
    found = (number.float() * factor).to(number.dtype)
    if not found.isfinite().all():
        dtype = str(number.dtype).removeprefix("torch.")
        raise ValueError(f"a scale times {factor} is more than {dtype} can hold")
    return found
