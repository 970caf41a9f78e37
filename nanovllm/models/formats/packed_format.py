"""What formats share whose weights are stored as `PackedWeight`.

O outputs | D depth | G groups of inputs | g inputs of a group | S columns as stored.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.reference.packed import BLOCK, E2M1, e2m1_table, pack
from nanovllm.models.formats.format import Axis, Extent, Format, Piece, spread
from nanovllm.models.formats.packed_weight import PackedWeight

# The inputs of a group on a rank that has some of the inputs of a matrix with an order: it has a
# part of each group, which is filled up to a multiple of this.
CUT_GROUP = 16


class Layout(NamedTuple):
    """How the codes of a checkpoint are stored here.

    group: inputs that share a scale; −1 are all. levels: the table; None: codes are integers.
    scale_dtype: of scales and offsets.
    """

    bits: int
    group: int
    levels: tuple[float, ...] | None = None
    has_offset: bool = True
    has_order: bool = False
    scale_dtype: torch.dtype = torch.float32


class PackedFormat(Format):
    """The base of such formats: they provide `layout`, `companions` and `read`."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "experts"})

    @property
    @abstractmethod
    def layout(self) -> Layout: ...

    @property
    def is_packed(self) -> bool:
        return True

    @property
    def joins_sources(self) -> bool:
        return not self.layout.has_order

    def group(self, extent: Extent) -> int:
        """The inputs of a group as stored: no group is cut."""
        layout, depth = self.layout, extent.shape[-1]
        if layout.group < 0:
            return depth
        if layout.has_order and depth < extent.all_columns:
            return math.gcd(layout.group, CUT_GROUP)
        return extent.column_block(layout.group)

    def num_columns(self, extent: Extent) -> int:
        """The columns as stored: more than inputs if groups with an order are filled up."""
        layout, depth = self.layout, extent.shape[-1]
        if not layout.has_order or depth == extent.all_columns:
            return depth
        num_groups = -(-extent.all_columns // layout.group)
        most = depth + num_groups * (self.group(extent) - 1)
        return -(-most // BLOCK) * BLOCK

    def table(self, device: torch.device | str) -> Tensor | None:
        levels = self.layout.levels
        if levels == E2M1:
            return e2m1_table(device)
        return None if levels is None else torch.tensor(levels, device=device)

    def empty(self, extent: Extent, device: torch.device | str) -> PackedWeight:
        layout, (*outer, depth) = self.layout, extent.shape
        columns, group = self.num_columns(extent), self.group(extent)
        num_bytes = columns if layout.bits == 8 else -(-columns // BLOCK) * BLOCK // 2
        code = torch.empty(*outer, num_bytes, dtype=torch.uint8, device=device)
        scale = code.new_empty((*outer, -(-columns // group)), dtype=layout.scale_dtype)
        offset = torch.empty_like(scale) if layout.has_offset else None
        order = None
        if layout.has_order:
            order = code.new_empty((*outer[:-1], columns), dtype=torch.int32)
        table = self.table(device)
        return PackedWeight(code, scale, offset, table, order, layout.bits, group, depth)

    def quantized(self, name: str, weight_OD: Tensor, extent: Extent) -> PackedWeight:
        """To the nearest levels, between the smallest and largest numbers of groups. With an order,
        inputs are in order."""
        layout, depth = self.layout, weight_OD.shape[1]
        group, columns = self.group(extent), self.num_columns(extent)
        padded = torch.nn.functional.pad(weight_OD.float(), (0, -columns % group + columns - depth))
        grouped_OGg = padded.unflatten(-1, (-1, group))
        if not grouped_OGg.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, so that it cannot be quantized")
        if layout.levels is None:
            code, scale_OG, offset_OG = between_extremes(grouped_OGg, layout.bits)
        else:
            code, scale_OG = nearest_levels(grouped_OGg, layout.levels)
            offset_OG = torch.zeros_like(scale_OG)
        order = None
        if layout.has_order:
            order = torch.arange(columns, dtype=torch.int32, device=weight_OD.device)
            order.clamp_(max=depth)
        return self.packed(code.flatten(-2)[:, :columns], scale_OG, offset_OG, order, extent)

    def packed(
        self,
        code_OS: Tensor,
        scale_OG: Tensor,
        offset_OG: Tensor | None,
        order_S: Tensor | None,
        extent: Extent,
    ) -> PackedWeight:
        """The stored weight, from its codes, scales and offsets in the groups as stored.

        Raises ValueError for scales that cannot be right.
        """
        layout = self.layout
        scale = scale_OG.to(layout.scale_dtype)
        offset = offset_OG.to(layout.scale_dtype) if offset_OG is not None else None
        if not all(x.isfinite().all() for x in (scale, offset) if x is not None):
            raise ValueError("a scale is NaN or infinite")
        return PackedWeight(
            pack(code_OS, layout.bits), scale.contiguous(),
            offset.contiguous() if offset is not None and layout.has_offset else None,
            self.table(code_OS.device), order_S, layout.bits, self.group(extent), extent.shape[-1],
        )  # fmt: skip

    def grouped(
        self,
        code_OD: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor,
        group_D: Tensor | None,
        piece: Piece,
        extent: Extent,
    ) -> PackedWeight:
        """The stored weight of a piece: (code − zero) · scale of the input's group.

        Scales and zeros are those of the groups that the piece touches; with the group of each
        input, `group_D`, those of all groups.
        """
        offset_OG = -zero_OG.float() * scale_OG
        if group_D is None:
            scale_OG, offset_OG = (self.of_groups(x, piece, extent) for x in (scale_OG, offset_OG))
            return self.packed(code_OD, scale_OG, offset_OG, None, extent)
        order_S, block_G = self.sorted_by_group(group_D, scale_OG.shape[1], extent)
        # the columns that fill groups up have any codes
        code_OS = code_OD[:, order_S.long().clamp(max=code_OD.shape[1] - 1)]
        return self.packed(code_OS, scale_OG[:, block_G], offset_OG[:, block_G], order_S, extent)

    def of_groups(self, of_groups_OG: Tensor, piece: Piece, extent: Extent) -> Tensor:
        """Numbers for the groups as stored, from those for the groups that a piece touches."""
        group, whole = self.group(extent), self.layout.group
        if whole < 0:
            return of_groups_OG
        first, num = piece.columns.start % whole // group, -(-piece.size[1] // group)
        return spread(of_groups_OG, whole // group, None, 1).narrow(1, first, num)

    def sorted_by_group(
        self, group_D: Tensor, num_groups: int, extent: Extent
    ) -> tuple[Tensor, Tensor]:
        """(order [S], the group of each group as stored), from the group of each input: `g_idx`.

        Raises ValueError for a group that is not there or that has other inputs than `group`.
        """
        if group_D.min() < 0 or group_D.max() >= num_groups:
            raise ValueError("g_idx names a group that is not there")
        depth, columns, group = len(group_D), self.num_columns(extent), self.group(extent)
        order = group_D.argsort(stable=True)
        if columns == depth:
            block_G = torch.arange(-(-depth // group), device=group_D.device)
            if not torch.equal(group_D[order].long(), spread(block_G, group, depth, 0)):
                raise ValueError(f"g_idx names groups of other sizes than {group} inputs")
            return order.int(), block_G
        counts = torch.bincount(group_D.long(), minlength=num_groups)
        if counts.max() > self.layout.group:
            raise ValueError(f"g_idx names a group of more than {self.layout.group} inputs")
        blocks = -(-counts // group)
        block_G = torch.arange(num_groups, device=group_D.device).repeat_interleave(blocks)
        # the place of the first column of each group, less that of its first input among the sorted
        skipped = (blocks * group - counts).cumsum(0) - (blocks * group - counts)
        place = torch.arange(depth, device=group_D.device) + skipped[group_D[order].long()]
        found = torch.full((columns,), depth, dtype=torch.int32, device=group_D.device)
        found[place] = order.int()
        rest = -(-columns // group) - len(block_G)
        return found, torch.nn.functional.pad(block_G, (0, rest))

    def joined(self, pieces: Sequence[PackedWeight]) -> PackedWeight:
        """All pieces have the same table, and none has an order if there are several."""
        if len(pieces) == 1:
            return pieces[0]
        first, offset = pieces[0], None
        if first.offset_OG is not None:
            offset = torch.cat([one.offset_OG for one in pieces if one.offset_OG is not None])
        return first._replace(
            code_OC=torch.cat([one.code_OC for one in pieces]),
            scale_OG=torch.cat([one.scale_OG for one in pieces]),
            offset_OG=offset,
        )

    def reordered(self, weight: PackedWeight, order_O: Tensor) -> PackedWeight:
        offset = weight.offset_OG
        return weight._replace(
            code_OC=weight.code_OC[order_O],
            scale_OG=weight.scale_OG[order_O],
            offset_OG=None if offset is None else offset[order_O],
        )

    def scaled(self, weight: PackedWeight, factor: float) -> PackedWeight:
        offset = weight.offset_OG
        return weight._replace(
            scale_OG=weight.scale_OG * factor, offset_OG=None if offset is None else offset * factor
        )


def between_extremes(grouped_OGg: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, offsets): the codes of a group are from its smallest to its largest number,
    and 0 is one of them."""
    largest = 2**bits - 1
    low, high = grouped_OGg.amin(-1).clamp(max=0.0), grouped_OGg.amax(-1).clamp(min=0.0)
    scale_OG = ((high - low) / largest).clamp(min=1e-12)
    zero_OG = (-low / scale_OG).round()
    code = (grouped_OGg / scale_OG.unsqueeze(-1)).round() + zero_OG.unsqueeze(-1)
    return code.clamp(0, largest).to(torch.uint8), scale_OG, -zero_OG * scale_OG


def nearest_levels(grouped_OGg: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(codes, scales): the largest magnitude of a group becomes the largest level."""
    table = torch.tensor(levels, device=grouped_OGg.device)
    scale_OG = (grouped_OGg.abs().amax(-1) / table.abs().max()).clamp(min=1e-12)
    known, code = table.sort()
    middle = (known[1:] + known[:-1]) / 2
    at = torch.bucketize(grouped_OGg / scale_OG.unsqueeze(-1), middle)
    return code[at].to(torch.uint8), scale_OG


def nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """The two codes of each byte along the last axis, one after the other."""
    low, high = packed & 15, packed >> 4
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def some_columns(code_OD: Tensor, piece: Piece, axis: Axis) -> Tensor:
    """The columns of a piece, from those of the blocks that it touches."""
    return code_OD.narrow(1, piece.columns.start % axis.block, piece.size[1])
