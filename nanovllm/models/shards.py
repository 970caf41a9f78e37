"""Which part of each parameter belongs to one rank of several (tensor parallelism).

A parameter is split along its `shard_axis`, each source by itself. Of an `is_expert_parallel`
parameter a rank has whole experts: an equal number, in the order of ranks. The pieces are `units`:
a head of attention is one, and elsewhere each row or column. If there are fewer units than ranks,
as with keys and values of a model with few of them, neighbours have the same unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.models.checkpoint import Cut
from nanovllm.models.formats.format import Piece
from nanovllm.models.param import Param


@dataclass(frozen=True)
class Shard:
    """Rank number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def experts(self, num_experts: int) -> range:
        """The experts that this rank has, if each rank has whole ones."""
        each = num_experts // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def places(self, num_experts: int) -> Tensor:
        """For each expert its place among those that this rank has, or −1: int32."""
        places_X = torch.full((num_experts,), -1, dtype=torch.int32)
        own = self.experts(num_experts)
        places_X[own.start : own.stop] = torch.arange(len(own), dtype=torch.int32)
        return places_X

    def sources(self, param: Param) -> range:
        """The indices of the sources of which this rank has a part."""
        num = len(param.sources)
        return self.experts(num) if param.is_expert_parallel else range(num)

    def cut(self, param: Param, source_idx: int) -> Cut:
        """The part of a source that this rank has."""
        # a source of experts is a matrix of one of them
        rest = param.shape[2:] if param.kind == "experts" else param.shape[1:]
        shape, axis = (param.parts[source_idx], *rest), param.shard_axis
        if axis is None or self.size == 1:
            return Cut.whole(shape)
        return Cut(shape, shape, axis, *self._range(param, source_idx, shape[axis]))

    def cuts_other(self, param: Param) -> list[Cut]:
        """The parts of the one tensor named `other_name`, which has all sources in it: of experts
        one part, and otherwise one of each source."""
        if param.kind == "experts" or param.shard_axis is None:
            return [self._cut_stacked(param)]
        shape, cuts, first = param.shape, [], 0
        for source_idx, rows in enumerate(param.parts):
            start, stop = self._range(param, source_idx, rows) if self.size > 1 else (0, rows)
            cuts.append(Cut(shape, shape, 0, first + start, first + stop))
            first += rows
        return cuts

    def pieces(self, param: Param, *, is_joined: bool) -> list[Piece]:
        """The matrices, or parts of them, that this rank has, in the order of the parameter's rows.

        With `is_joined` they are in the one tensor named `other_name`: experts beside each other,
        the sources of a matrix below each other.
        """
        num = param.num_matrices
        per_matrix, (all_rows, all_columns) = len(param.parts) // num, param.shape[-2:]
        columns = range(all_columns)
        if param.shard_axis == 1 and self.size > 1:
            columns = range(*self._range(param, 0, all_columns))
        pieces = []
        for expert in self.experts(num) if param.is_expert_parallel else range(num):
            first = 0
            for i in range(expert * per_matrix, (expert + 1) * per_matrix):
                num_rows = param.parts[i]
                is_cut = param.shard_axis == 0 and self.size > 1
                start, stop = self._range(param, i, num_rows) if is_cut else (0, num_rows)
                if is_joined:
                    assert param.other_name is not None
                    rows = range(first + start, first + stop)
                    which = (expert, num) if param.kind == "experts" else (0, 0)
                    shape = (all_rows, all_columns)
                    pieces.append(Piece(param.other_name, shape, rows, columns, *which))
                else:
                    shape = (num_rows, all_columns)
                    pieces.append(Piece(param.sources[i], shape, range(start, stop), columns))
                first += num_rows
        return pieces

    def _cut_stacked(self, param: Param) -> Cut:
        shape, axis = param.shape, param.shard_axis
        if param.is_expert_parallel:
            own = self.experts(shape[0])
            return Cut(shape, shape, 0, own.start, own.stop)
        if axis is None or self.size == 1:
            return Cut.whole(shape)
        if axis == 1:
            return Cut(shape, shape, 2, *self._range(param, 0, shape[2]))
        # gate's rows of an expert, then up's
        rows = param.parts[0]
        seen = (shape[0] * shape[1] // rows, rows, shape[2])
        return Cut(shape, seen, 1, *self._range(param, 0, rows))

    def _range(self, param: Param, source_idx: int, length: int) -> tuple[int, int]:
        """Where this rank's part of `length` rows or columns begins and ends: the last rank's part
        of a vocabulary may be shorter than its share."""
        num = param.share(source_idx, length, self.size)
        units = param.units[source_idx] if param.units else length
        start = (self.rank * units // self.size if self.size > units else self.rank) * num
        return min(start, length), min(start + num, length)


ALL = Shard()


def taken(shard: Shard, param: Param, whole: Tensor) -> Tensor:
    """A rank's part of a whole parameter, padded with zeros."""
    if shard.size == 1:
        return whole
    if param.is_first_only and shard.rank:
        return torch.zeros_like(whole)
    if param.is_expert_parallel:
        own = shard.experts(len(whole))
        return whole[own.start : own.stop].clone()
    if param.shard_axis is None:
        return whole
    small = param.local(shard.size)
    out = whole.new_zeros(small.shape)
    rows = out if out.dim() < 3 else out.flatten(0, -2)
    sources = (whole if whole.dim() < 3 else whole.flatten(0, -2)).split(param.parts)
    for source_idx, (source, target) in enumerate(zip(sources, rows.split(small.parts))):
        cut = shard.cut(param, source_idx)
        target.narrow(cut.axis, 0, cut.stop - cut.start).copy_(cut.of(source))
    return out
