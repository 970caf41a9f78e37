"""One parameter of a model: its tensors in a checkpoint, its shape, and how ranks share it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanovllm.models.formats.format import Extent

ParamKind = Literal[
    "linear", "norm", "bias", "table", "router", "experts", "basis", "places", "conv", "heads",
    "plain",
]  # fmt: skip
PACKABLE = frozenset({"linear", "experts", "table"})  # a scheme chooses the formats of these kinds
# (tensor, rows of each source in it), see `Param`
Adapt = Callable[[Tensor, tuple[int, ...]], object]


@dataclass(frozen=True)
class Times:
    """Multiplies a parameter. It is rounded once, to the model's dtype."""

    factor: float

    def __call__(self, weight: Tensor, parts: tuple[int, ...]) -> None:
        weight.mul_(self.factor)


@dataclass(frozen=True)
class PlusOne:
    """Folds the 1 of 1 + w into a norm's weight w, and a factor. It is rounded once."""

    factor: float = 1.0

    def __call__(self, weight_D: Tensor, parts: Sequence[int]) -> None:
        weight_D.copy_((weight_D.float() + 1.0) * self.factor)


class RowOrder(ABC):
    """Puts the rows of a parameter in another order."""

    @abstractmethod
    def order(self, parts: tuple[int, ...]) -> Tensor:
        """For each row, the row that takes its place; `parts` are the rows of each source."""

    def __call__(self, weight_OD: Tensor, parts: tuple[int, ...]) -> None:
        weight_OD.copy_(weight_OD[self.order(parts).to(weight_OD.device)])


@dataclass(frozen=True)
class OrderOfSome(RowOrder):
    """The order of the rows of some sources: `before` and `after` are the rows of the others, all
    of which keep their rows among themselves."""

    whole: RowOrder
    before: tuple[int, ...]
    after: tuple[int, ...]

    def order(self, parts: tuple[int, ...]) -> Tensor:
        first, num = sum(self.before), sum(parts)
        order_O = self.whole.order((*self.before, *parts, *self.after))[first : first + num] - first
        if order_O.min() < 0 or order_O.max() >= num:
            raise ValueError("rows go from one source to another, which has another format")
        return order_O


class Param(NamedTuple):
    """One parameter: the checkpoint tensors `sources`, stacked along axis 0, have `shape`.

    `kind` is one of these. "linear" is the weight of a linear layer [O, D], "experts" the matrices
    of a layer's experts [E, O, D], whose rows are stacked expert by expert, "table" an embedding
    table: a scheme (`schemes`) chooses the formats of these. All others are plain tensors: "conv"
    is the kernel of a convolution, "router" the matrix that scores experts, "basis" a matrix that
    compressed experts share, "heads" a matrix for each head of attention, whose products are
    batched: a checkpoint may store it in the format of a linear layer. "plain" is any other.
    "places" is where a rank's experts are in its stack (`Shard.places`), which no checkpoint has.
    `parts` are the row counts of the sources. A checkpoint may have one tensor of `shape` with the
    name `other_name` instead.
    If it `may_be_transposed`, its last two axes may be exchanged there. If it `is_interleaved`,
    they are, and the rows of a matrix's sources take turns.

    `shard_axis` is the axis of the sources that tensor parallelism splits, each source by itself;
    None for a parameter that every rank has (`shards`). `units` are the numbers of heads in the
    sources, which are not split; empty if every row or column may go to another rank. An `is_vocab`
    parameter has a row for each token id: its last part is padded. An `is_first_only` parameter is
    zero on all ranks but the first, since the sum over the ranks must have it once. The experts of
    an `is_expert_parallel` parameter are not split: each rank has an equal share of them.

    `adapt` changes a tensor in place after it was read: it folds what a family does to a weight's
    result, or to its rows' order, into the weight. It gets this rank's part, with the row count of
    each source in it. Weights that are not plain take only a `RowOrder` and `Times`.

    It is stored in `dtype`, or in the model's if that is None; only plain tensors have one.

    If `source_shape` is given, each source has this shape and fills the first rows and columns of
    its part; the rest is zero. Only towers have such parameters (`vision.weights`).

    A `compressed` parameter is read from `svd_experts`, which resolves its sources. The
    checkpoint's tensors that `replaces` names are not read.
    """

    kind: ParamKind
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    parts: tuple[int, ...]
    shard_axis: int | None
    other_name: str | None = None
    compressed: bool = False
    replaces: tuple[str, ...] = ()
    units: tuple[int, ...] = ()
    is_vocab: bool = False
    is_first_only: bool = False
    is_expert_parallel: bool = False
    may_be_transposed: bool = False
    is_interleaved: bool = False
    adapt: Adapt | None = None
    source_shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def one(cls, kind: ParamKind, source: str, *shape: int, shard_axis: int | None = None) -> Param:
        """A parameter that is one tensor of the checkpoint."""
        return cls(kind, shape, (source,), (shape[0],), shard_axis)

    @classmethod
    def vocab(cls, kind: ParamKind, source: str, *shape: int) -> Param:
        """A tensor of the checkpoint with a row for each token id."""
        return cls(kind, shape, (source,), (shape[0],), 0, is_vocab=True)

    @classmethod
    def stack(
        cls, kind: ParamKind, sources: tuple[str, ...], parts: tuple[int, ...], *rest: int
    ) -> Param:
        """Several tensors with the same shape `rest` beyond axis 0, split along axis 0."""
        return cls(kind, (sum(parts), *rest), sources, parts, 0)

    @property
    def is_of_experts(self) -> bool:
        """True for the matrices of a layer's experts, and for their biases [E, O]."""
        return self.kind == "experts" or (self.kind == "bias" and len(self.shape) > 1)

    @property
    def expert_rows(self) -> tuple[int, ...]:
        """The row counts of the sources of each matrix."""
        return self.parts[: len(self.parts) // self.num_matrices]

    @property
    def num_matrices(self) -> int:
        return self.shape[0] if self.kind == "experts" else 1

    def some(self, first: int, stop: int) -> Param:
        """The rows of some of the sources: of each matrix those with the numbers from `first`."""
        num = self.num_matrices
        per_matrix = len(self.parts) // num
        if stop - first == per_matrix:
            return self
        chosen = [m * per_matrix + i for m in range(num) for i in range(first, stop)]
        parts = tuple(self.parts[i] for i in chosen)
        shape = (*self.shape[:-2], sum(parts) // num, self.shape[-1])
        adapt = self.adapt
        if isinstance(adapt, RowOrder):
            adapt = OrderOfSome(adapt, self.parts[:first], self.parts[stop:])
        return self._replace(
            shape=shape,
            sources=tuple(self.sources[i] for i in chosen),
            parts=parts,
            units=self.units and self.units[first:stop],
            other_name=None,
            adapt=adapt,
        )

    def share(self, source_idx: int, length: int, num_ranks: int) -> int:
        """How many of `length` rows or columns of a source each of `num_ranks` ranks has.

        Raises ValueError if they cannot be shared evenly.
        """
        units = self.units[source_idx] if self.units else length
        if units % num_ranks == 0:
            return length // num_ranks
        if self.is_vocab:
            return -(-length // num_ranks)
        if self.units and num_ranks % units == 0:
            return length // units
        what = "heads" if self.units else "rows" if self.shard_axis == 0 else "columns"
        raise ValueError(
            f"{num_ranks} ranks cannot share the {units} {what} of {self.sources[source_idx]} "
            "evenly: choose another tensor_parallel_size"
        )

    def local(self, num_ranks: int) -> Param:
        """The parameter with the sizes that it has on each of `num_ranks` ranks."""
        axis = self.shard_axis
        if self.is_expert_parallel:
            num = self.shape[0] // num_ranks
            parts = self.parts[: len(self.parts) // num_ranks]
            return self._replace(shape=(num, *self.shape[1:]), parts=parts)
        if axis is None or num_ranks == 1:
            return self
        shape, parts = list(self.shape), self.parts
        if axis:
            shape[-1] = self.share(0, shape[-1], num_ranks)
        else:
            parts = tuple(self.share(i, rows, num_ranks) for i, rows in enumerate(parts))
            rows_axis = 1 if self.kind == "experts" else 0
            shape[rows_axis] = sum(parts) // math.prod(shape[:rows_axis])
        return self._replace(shape=tuple(shape), parts=parts)

    def extent(self, num_ranks: int, dtype: torch.dtype) -> Extent:
        """The extent of each rank's part, for its format."""
        small, axis = self.local(num_ranks), None if num_ranks == 1 else self.shard_axis
        num = len(self.parts) // self.num_matrices
        bounds = [*accumulate(small.parts[: num - 1])]
        if axis == 0:
            bounds += small.parts[:num]
        if self.other_name is not None:  # sources may be parts of one tensor
            bounds += accumulate(self.parts[: num - 1])
        if isinstance(self.adapt, RowOrder):
            bounds.append(1)
        columns = small.shape[-1] if axis == 1 else 0
        dtype = self.dtype or dtype
        return Extent(small.shape, dtype, math.gcd(*bounds), columns, self.shape[-1])
