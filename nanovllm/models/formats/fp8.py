"""Weights in float8_e4m3fn with a scale for each tensor, output or block, as checkpoints have them.

Products dequantize, and inputs stay as they are: the scales of inputs are not read.
O outputs | D depth | R blocks of rows | G blocks of columns | T tokens | K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.models.formats.format import Axis, Companion, Extent, Format, Piece, spread

UNREAD = ("input_scale", "activation_scale")  # vLLM's name and transformers'
LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)


class Fp8Weight(NamedTuple):
    """weight = values · scale of the block; a block has so many rows and columns."""

    values_OD: Tensor
    scale_RG: Tensor
    block_rows: int
    block_columns: int

    def linear(self, x_TD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
        return ops.fp8_linear(x_TD, *self, bias_O, residual_TO)

    def rows(self, first: int) -> Tensor:
        return reference.packed.of_fp8(*self)[first:]

    def expert_linear(self, x: Tensor, expert_TK: Tensor) -> Tensor:
        return ops.fp8_expert_linear(x, expert_TK, *self)

    def experts(
        self,
        x_TD: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        down: Fp8Weight,
        residual_TD: Tensor | None,
        local_X: Tensor | None,
    ) -> Tensor | None:
        """See `formats.experts`; None if the device has no kernel."""
        if not ops.has_kernel(ops.fp8_experts, x_TD.device):
            return None
        result: Tensor = ops.fp8_experts(
            x_TD, weight_TK, expert_TK, *self, *down, residual_TD, local_X
        )
        return result


@dataclass(frozen=True)
class Fp8(Format):
    """`block` are the rows and columns that share a scale; 0 columns are all of them, and 0 rows
    and columns the whole tensor. `scale` is the end of the scales' name, and `other_scale` the end
    that some checkpoints have instead."""

    block: tuple[int, int]
    scale: str
    other_scale: str | None = None
    name: ClassVar[str] = "fp8"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "experts"})

    @property
    def is_packed(self) -> bool:
        return True

    def empty(self, extent: Extent, device: torch.device | str) -> Fp8Weight:
        rows, columns = self._block(extent)
        *outer, num_rows, depth = extent.shape
        values = torch.empty(extent.shape, dtype=torch.float8_e4m3fn, device=device)
        shape = (*outer, -(-num_rows // rows), -(-depth // columns))
        scale = torch.empty(shape, dtype=torch.float32, device=device)
        return Fp8Weight(values, scale, rows, columns)

    def quantized(self, name: str, weight_OD: Tensor, extent: Extent) -> Fp8Weight:
        """The largest magnitude of a block becomes 448."""
        _, scale_RG, rows, columns = self.empty(extent, weight_OD.device)
        num_rows, depth = weight_OD.shape
        padding = (0, -depth % columns, 0, -num_rows % rows)
        blocks = torch.nn.functional.pad(weight_OD.float(), padding).abs()
        blocks_RrGc = blocks.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scale_RG.copy_(blocks_RrGc.amax((1, 3)) / LARGEST)
        if not scale_RG.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, so that it cannot be quantized")
        scale_OG = spread(scale_RG.where(scale_RG > 0, 1.0), rows, num_rows, -2)
        values_OD = weight_OD.float() / spread(scale_OG, columns, depth, -1)
        return Fp8Weight(values_OD.to(torch.float8_e4m3fn), scale_RG, rows, columns)

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        rows, columns = self.block
        scales = Companion((Axis("rows", rows or 1), Axis("columns", columns or 1)), torch.float32)
        if not columns:
            axes = (Axis("rows"),) if rows else ()
            scales = Companion(axes, torch.float32, shape=(shape[0], 1) if rows else None)
        return {
            "weight": Companion((Axis("rows"), Axis("columns")), torch.float8_e4m3fn),
            self.scale: scales._replace(other_end=self.other_scale),
            **{end: Companion((), torch.float32, True, True) for end in UNREAD},
        }

    def companion_name(self, source: str, end: str) -> str:
        """Stacked experts have no module: `gate_up_proj` and `gate_up_proj_scale_inv`."""
        if source.endswith(".weight"):
            return super().companion_name(source, end)
        return source + (end.removeprefix("weight") if end.startswith("weight") else f"_{end}")

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> Fp8Weight:
        scale = raw[self.scale]
        if not scale.isfinite().all():
            raise ValueError("a scale is NaN or infinite")
        if has_nan(raw["weight"]):
            raise ValueError("a number is NaN")
        (num_rows, depth), (rows, columns) = piece.size, self._block(extent)
        num_row_blocks, num_column_blocks = -(-num_rows // rows), -(-depth // columns)
        if not self.block[1]:  # of the tensor, or of each row
            scale_RG = scale.view(-1, 1).expand(num_row_blocks, 1)
        else:
            of_rows = spread(scale, self.block[0] // rows, None, 0)
            first = piece.rows.start % self.block[0] // rows
            some = of_rows.narrow(0, first, num_row_blocks)
            of_columns = spread(some, self.block[1] // columns, None, 1)
            first = piece.columns.start % self.block[1] // columns
            scale_RG = of_columns.narrow(1, first, num_column_blocks)
        return Fp8Weight(raw["weight"], scale_RG.contiguous(), rows, columns)

    def scaled(self, weight: Fp8Weight, factor: float) -> Fp8Weight:
        return weight._replace(scale_RG=weight.scale_RG * factor)

    def _block(self, extent: Extent) -> tuple[int, int]:
        """The rows and columns of a block as stored: none is cut."""
        rows, columns = self.block
        if not columns:
            return 1, extent.shape[-1]
        return extent.row_block(rows), extent.column_block(columns)


def has_nan(values: Tensor) -> bool:
    """Whether one of the codes is 0x7f or 0xff, the NaNs of e4m3: the largest byte with a sign, and
    without one. Two passes without a copy; `isnan` takes 50 times as long on a CPU."""
    if not values.numel():
        return False
    largest = values.view(torch.int8).amax(), values.view(torch.uint8).amax()
    return largest[0].item() == 0x7F or largest[1].item() == 0xFF


@dataclass(frozen=True)
class Fp8Rounded(Fp8):
    """The same, from numbers in the model's dtype: the option "fp8"."""

    @property
    def is_packed(self) -> bool:
        return False
