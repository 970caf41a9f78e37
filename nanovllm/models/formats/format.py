"""The interface of a weight format, and its description of a parameter.

O outputs (rows) | D depth (columns) | E experts. A matrix is [O, D], the experts of a layer are
[E, O, D]. A *block* is a group of rows or columns that share a number, such as a scale, or a word.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor


class Stored(Protocol):
    """A stored weight that is not one plain tensor: a named tuple of tensors and of sizes.

    The sizes are ints, which are part of a program's key. A product needs nothing but the tensors
    and the sizes. Only the experts of a layer have E.
    """

    def linear(self, x_TD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
        """x · weightᵀ + bias + residual: [T, O] in the dtype of x."""

    def rows(self, first: int) -> Tensor:
        """The real values of the rows from `first` on, in fp32."""

    def expert_linear(self, x: Tensor, expert_TK: Tensor) -> Tensor:
        """See `reference.experts.expert_linear`; `expert_TK` holds valid numbers alone. For formats
        of "experts" alone."""

    def lookup(self, row_T: Tensor, dtype: torch.dtype) -> Tensor:
        """The real values of some rows: [T, D] in `dtype`. For formats of "table" alone."""


# A tensor in the model's dtype, or a named tuple that provides `Stored`.
Weight: TypeAlias = "Tensor | tuple[Any, ...]"


class Extent(NamedTuple):
    """The part of a parameter that a rank has: a matrix, or a matrix for each expert.

    A multiple of `row_unit` rows lies before each boundary within the part, and before each place
    where a rank's part of a source may begin: a block of rows that divides it is never cut. It is 0
    without such boundaries, and 1 if rows change places. `column_unit` is the same for columns. All
    ranks have the same extent. The matrix has `all_columns` on all ranks together.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    row_unit: int = 0
    column_unit: int = 0
    all_columns: int = 0

    @property
    def matrix(self) -> Extent:
        """The extent of one of the matrices."""
        return self._replace(shape=self.shape[-2:])

    def row_block(self, block: int) -> int:
        """The largest block of rows, up to `block`, that no boundary cuts."""
        return math.gcd(block, self.row_unit)

    def column_block(self, block: int) -> int:
        """The largest block of columns, up to `block`, that no boundary cuts."""
        return math.gcd(block, self.column_unit)


class Piece(NamedTuple):
    """Rows and columns of a matrix of `shape` that a checkpoint has as the module `source`.

    `source` is a name as `Param.sources` or `Param.other_name` has it. Where it names the matrices
    of `num_experts` experts together, `expert` is the number of one.
    """

    source: str
    shape: tuple[int, int]
    rows: range
    columns: range
    expert: int = 0
    num_experts: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)


class Axis(NamedTuple):
    """An axis of a checkpoint's tensor: an entry for every `block` rows or columns of a matrix.

    An entry has `width` numbers, such as the bytes of a block. The last block may be shorter. A
    piece gets the entries of the blocks that it touches, or all entries if the axis is `whole`.
    """

    of: Literal["rows", "columns"]
    block: int = 1
    whole: bool = False
    width: int = 1

    def size(self, shape: tuple[int, int]) -> int:
        return -(-shape[self.of == "columns"] // self.block) * self.width

    def range(self, piece: Piece) -> range:
        """The numbers that a piece gets."""
        numbers = piece.columns if self.of == "columns" else piece.rows
        if self.whole:
            return range(self.size(piece.shape))
        first, stop = numbers.start // self.block, -(-numbers.stop // self.block)
        return range(first * self.width, stop * self.width)


class Companion(NamedTuple):
    """One of the tensors in which a checkpoint stores a matrix.

    Floating point numbers are converted to `dtype` as they are read; other tensors must be stored
    in it. `shape` is the stored one if it differs from the axes' sizes, which then are a view of
    it. An `is_unread` tensor may be present and is not needed. A tensor of one axis that every
    piece needs `whole` has no axes, and so many numbers: at least, and at most. `other_end` is the
    end of its name in some checkpoints.
    """

    axes: tuple[Axis, ...]
    dtype: torch.dtype
    is_optional: bool = False
    is_unread: bool = False
    shape: tuple[int, ...] | None = None
    whole: tuple[int, int] | None = None
    other_end: str | None = None


class Format(ABC):
    """How weights are stored, multiplied, and read from a checkpoint. Formats are frozen
    dataclasses: their fields are what differs between checkpoints, such as sizes of groups.

    An `is_packed` format reads a checkpoint's own numbers, which its `companions` hold. Another one
    converts numbers in the model's dtype.

    `kinds` are the kinds of `Param` that it takes: "experts" if its weights have `expert_linear`,
    "table" if they have `lookup`.
    """

    name: ClassVar[str]  # in messages
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    @property
    def is_packed(self) -> bool:
        return False

    @property
    def is_plain(self) -> bool:
        """True if a weight is one tensor in the model's dtype."""
        return False

    @property
    def joins_sources(self) -> bool:
        """False if the sources of a matrix stay weights of their own (`formats.mixed`): if each
        has its own order of columns, say."""
        return True

    def refusal(self, extent: Extent) -> str | None:
        """Why a part cannot be stored, if it cannot: a boundary cuts a block that cannot become
        smaller, say."""
        return None

    @abstractmethod
    def empty(self, extent: Extent, device: torch.device | str) -> Weight:
        """Memory for a stored weight: the tensors with shapes and dtypes, and the sizes."""

    @abstractmethod
    def quantized(self, name: str, weight_OD: Tensor, extent: Extent) -> Weight:
        """Convert a matrix in the model's dtype; `name` is for error messages."""

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        """The tensors of a checkpoint for a matrix of `shape`, by the ends of their names."""
        raise NotImplementedError

    def companion_name(self, source: str, end: str) -> str:
        """The name of a companion of the matrix `source`: `end` follows the module's name."""
        module = source.removesuffix("weight")
        return module + end if module != source else f"{source}_{end}"

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> Weight:
        """A piece as it is stored. `raw` are its parts of the companions, by the ends of their
        names, on the device: each axis has the entries of `Axis.range`.

        Raises ValueError for numbers that cannot be right.
        """
        raise NotImplementedError

    def joined(self, pieces: Sequence[Any]) -> Any:
        """The weight whose rows are those of all pieces, one after another."""
        if len(pieces) == 1:
            return pieces[0]
        fields = zip(*pieces)
        return type(pieces[0])(
            *(torch.cat(one) if isinstance(one[0], Tensor) else one[0] for one in fields)
        )

    def reordered(self, weight: Any, order_O: Tensor) -> Any:
        """The weight with row order_O[i] as its row i; its blocks of rows have one row each."""
        return type(weight)(*(one[order_O] if isinstance(one, Tensor) else one for one in weight))

    def scaled(self, weight: Any, factor: float) -> Any:
        """The weight times a factor, which goes to its scales. Raises ValueError if it cannot."""
        raise ValueError(f"the format {self.name} cannot take the factor {factor}")


def spread(of_blocks: Tensor, block: int, size: int | None, axis: int) -> Tensor:
    """A number for each of the first `size` rows or columns, from one for each block of them."""
    found = of_blocks if block == 1 else of_blocks.repeat_interleave(block, axis)
    return found if size is None else found.narrow(axis, 0, size)


@cache
def num_bytes(stored_as: Format, extent: Extent) -> int:
    """Bytes of a stored weight."""
    weight = stored_as.empty(extent, "meta")
    return sum(one.nbytes for one in tensors_of(weight))


def tensors_of(weight: Any) -> list[Tensor]:
    """The tensors of a stored weight."""
    if isinstance(weight, Tensor):
        return [weight]
    return [x for one in weight for x in tensors_of(one)] if isinstance(weight, tuple) else []


def mapped(function: Callable[[Tensor], Tensor], weight: Any) -> Any:
    """The weight with a function's results in the place of its tensors."""
    if isinstance(weight, Tensor):
        return function(weight)
    if not isinstance(weight, tuple):
        return weight
    fields = [mapped(function, one) for one in weight]
    return type(weight)(*fields) if hasattr(weight, "_fields") else tuple(fields)


def quantized(stored_as: Format, name: str, weight: Tensor, extent: Extent) -> Weight:
    """Convert a parameter in the model's dtype: a matrix, or a matrix for each expert."""
    if weight.dim() < 3 or stored_as.is_plain:
        return stored_as.quantized(name, weight, extent)
    stored = stored_as.empty(extent, weight.device)
    if isinstance(stored, Tensor):
        return stored_as.quantized(name, weight, extent)
    for expert, matrix_OD in enumerate(weight):
        fill(stored, expert, stored_as.quantized(name, matrix_OD, extent.matrix))
    return stored


def fill(stored: Weight, expert: int, matrix: Weight) -> None:
    """Write the matrix of an expert to its place among those of all experts. What all of them
    share, such as a table of levels, has no axis of experts and stays."""
    if isinstance(stored, Tensor):
        assert isinstance(matrix, Tensor)
        stored[expert] = matrix
        return
    for target, source in zip(stored, matrix):
        if isinstance(target, Tensor) and target.dim() > source.dim():
            target[expert] = source
