"""4-bit floating point (e2m1): MXFP4 and NVFP4 of compressed-tensors, NVFP4 of ModelOpt, and MXFP4
of gpt-oss.

A byte has two columns, the first one in its lower half. MXFP4 has a power of two for 32 columns,
NVFP4 an e4m3 number for 16 and one fp32 number for the matrix, by which that is divided (ModelOpt:
multiplied).
O outputs | D depth | G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.kernels.reference.packed import E2M1
from nanovllm.models.formats.compressed import unread
from nanovllm.models.formats.format import Axis, Companion, Extent, Piece
from nanovllm.models.formats.packed_format import Layout, PackedFormat, nibbles, some_columns
from nanovllm.models.formats.packed_weight import PackedWeight

NV_GROUP, MX_GROUP = 16, 32
BYTES = Axis("columns", 2)


def powers(byte: Tensor) -> Tensor:
    """2^(byte − 127), in fp32; 255 is NaN."""
    return byte.contiguous().view(torch.float8_e8m0fnu).float()


@dataclass(frozen=True)
class NvFp4(PackedFormat):
    """As compressed-tensors stores it."""

    name: ClassVar[str] = "nvfp4"
    code_end: ClassVar[str] = "weight_packed"
    whole_end: ClassVar[str] = "weight_global_scale"
    input_end: ClassVar[str] = "input_global_scale"

    @property
    def layout(self) -> Layout:
        return Layout(4, NV_GROUP, E2M1, has_offset=False)

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        groups = (Axis("rows"), Axis("columns", NV_GROUP))
        return {
            self.code_end: Companion((Axis("rows"), BYTES), torch.uint8),
            "weight_scale": Companion(groups, torch.float8_e4m3fn),
            self.whole_end: Companion((), torch.float32),
            **unread(self.input_end),
        }

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> PackedWeight:
        scale_OG = self._scales(raw["weight_scale"].float(), raw[self.whole_end])
        code_OD = some_columns(nibbles(raw[self.code_end]), piece, BYTES)
        return self.packed(code_OD, self.of_groups(scale_OG, piece, extent), None, None, extent)

    def _scales(self, scale_OG: Tensor, whole: Tensor) -> Tensor:
        """The scales of groups, from the stored ones and that of the whole matrix."""
        whole = whole.abs()
        if not whole.isfinite().all():  # the scales of all groups would be 0
            raise ValueError(f"{self.whole_end} is NaN or infinite")
        return scale_OG / whole  # 0 gives an infinite scale, which is refused


@dataclass(frozen=True)
class NvFp4OfModelOpt(NvFp4):
    """The scale of the whole matrix is a factor here, not a divisor."""

    code_end: ClassVar[str] = "weight"
    whole_end: ClassVar[str] = "weight_scale_2"
    input_end: ClassVar[str] = "input_scale"

    def _scales(self, scale_OG: Tensor, whole: Tensor) -> Tensor:
        return scale_OG * whole


@dataclass(frozen=True)
class MxFp4(PackedFormat):
    name: ClassVar[str] = "mxfp4"

    @property
    def layout(self) -> Layout:
        # bf16 has all powers of two of a byte
        return Layout(4, MX_GROUP, E2M1, has_offset=False, scale_dtype=torch.bfloat16)

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        groups = (Axis("rows"), Axis("columns", MX_GROUP))
        return {
            "weight_packed": Companion((Axis("rows"), BYTES), torch.uint8),
            "weight_scale": Companion(groups, torch.uint8),
            **unread("input_global_scale"),
        }

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> PackedWeight:
        code_OD = some_columns(nibbles(raw["weight_packed"]), piece, BYTES)
        scale_OG = self.of_groups(powers(raw["weight_scale"]), piece, extent)
        return self.packed(code_OD, scale_OG, None, None, extent)


@dataclass(frozen=True)
class MxFp4Experts(MxFp4):
    """All experts of a layer in `gate_up_proj_blocks` [E, O, D / 32, 16], `gate_up_proj_scales`
    [E, O, D / 32], and the same of `down_proj`. Each row of gate is followed by that of up.

    A piece reads all rows: those of gate lie between those of up.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"experts"})

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        rows = Axis("rows", whole=True)
        blocks = (rows, Axis("columns", MX_GROUP, width=MX_GROUP // 2))
        stored = (shape[0], -(-shape[1] // MX_GROUP), MX_GROUP // 2)
        return {
            "blocks": Companion(blocks, torch.uint8, shape=stored),
            "scales": Companion((rows, Axis("columns", MX_GROUP)), torch.uint8),
        }

    def refusal(self, extent: Extent) -> str | None:
        if extent.all_columns % MX_GROUP == 0:
            return None
        return f"its {extent.all_columns} columns are not in whole blocks of {MX_GROUP}"

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> PackedWeight:
        row = torch.arange(piece.rows.start, piece.rows.stop, device=raw["blocks"].device)
        if piece.source.endswith("gate_up_proj"):
            half = piece.shape[0] // 2
            row = row % half * 2 + row // half
        codes = nibbles(raw["blocks"][row])
        code_OD = some_columns(codes, piece, Axis("columns", MX_GROUP))
        scale_OG = self.of_groups(powers(raw["scales"][row]), piece, extent)
        return self.packed(code_OD, scale_OG, None, None, extent)
