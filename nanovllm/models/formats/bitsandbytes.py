"""Checkpoints of the library bitsandbytes: nf4 and fp4 in blocks of 64, and int8 of outputs.

A byte of 4 bits has two columns, the first one in its upper half. The scale of a block, `absmax`,
is fp32, or the code of a number in 256 levels (double quantization): `nested_absmax` has the scales
of 256 such codes. O outputs | D depth | G groups of inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanovllm.models.formats.format import Axis, Companion, Extent, Piece
from nanovllm.models.formats.packed_format import Layout, PackedFormat, nibbles, some_columns
from nanovllm.models.formats.packed_weight import PackedWeight

# The quantiles of a normal distribution that QLoRA (arXiv 2305.14314, appendix E) gives for nf4.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(one / 12 for one in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = (*_FP4, *(-one for one in _FP4))
LEVELS = {"nf4": NF4, "fp4": FP4}
BLOCK, NESTED_BLOCK, NESTED_LEVELS = 64, 256, 256
MOST_STATE_BYTES = 4096  # of a JSON text with ten short fields
BYTES = Axis("columns", 2)


@dataclass(frozen=True)
class Bnb4(PackedFormat):
    """`kind` is "nf4" or "fp4"."""

    kind: str
    is_nested: bool
    name: ClassVar[str] = "bitsandbytes 4-bit"

    @property
    def layout(self) -> Layout:
        return Layout(4, BLOCK, LEVELS[self.kind], has_offset=False)

    @property
    def _state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    def refusal(self, extent: Extent) -> str | None:
        if extent.all_columns % BLOCK == 0:
            return None
        return f"blocks of {BLOCK} numbers do not end with its rows of {extent.all_columns}"

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        num, axes = shape[0] * shape[1], (Axis("rows"), Axis("columns", BLOCK))
        absmax = Companion(axes, torch.uint8 if self.is_nested else torch.float32)
        found = {
            "weight": Companion((Axis("rows"), BYTES), torch.uint8, shape=(-(-num // 2), 1)),
            "weight.absmax": absmax._replace(shape=(num // BLOCK,)),
            "weight.quant_map": _whole(len(NF4)),
            self._state: Companion((), torch.uint8, whole=(2, MOST_STATE_BYTES)),
        }
        if not self.is_nested:
            return found
        num_nested = -(-num // BLOCK // NESTED_BLOCK)
        return {
            **found,
            "weight.nested_absmax": _whole(num_nested),
            "weight.nested_quant_map": _whole(NESTED_LEVELS),
        }

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> PackedWeight:
        state = _parsed(raw[self._state])
        _require(state, quant_type=self.kind, blocksize=BLOCK, shape=list(piece.shape))
        known = torch.tensor(LEVELS[self.kind], device=raw["weight.quant_map"].device)
        if not torch.allclose(raw["weight.quant_map"], known, rtol=0, atol=1e-6):
            raise ValueError(f"quant_map has other levels than those of {self.kind}")
        scale_OG = self._absmax(raw, state, piece) if self.is_nested else raw["weight.absmax"]
        code_OD = some_columns(nibbles(raw["weight"], high_first=True), piece, BYTES)
        return self.packed(code_OD, self.of_groups(scale_OG, piece, extent), None, None, extent)

    def _absmax(self, raw: Mapping[str, Tensor], state: Mapping[str, Any], piece: Piece) -> Tensor:
        """The scales of the blocks that a piece touches, from their codes."""
        _require(state, nested_blocksize=NESTED_BLOCK)
        offset, code_OG = state.get("nested_offset"), raw["weight.absmax"]
        if isinstance(offset, bool) or not isinstance(offset, (int, float)):
            raise ValueError(f"its quant_state has nested_offset {offset!r}: it must be a number")
        axis = Axis("columns", BLOCK)
        columns = torch.tensor(axis.range(piece), device=code_OG.device)
        rows = torch.tensor(piece.rows, device=code_OG.device)
        number_OG = rows.unsqueeze(1) * axis.size(piece.shape) + columns
        level_OG = raw["weight.nested_quant_map"][code_OG.long()]
        return level_OG * raw["weight.nested_absmax"][number_OG // NESTED_BLOCK] + offset


@dataclass(frozen=True)
class Bnb8(PackedFormat):
    """`weight` [O, D] in int8 times `SCB` [O] / 127."""

    name: ClassVar[str] = "bitsandbytes int8"

    @property
    def layout(self) -> Layout:
        return Layout(8, -1)

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        return {
            "weight": Companion((Axis("rows"), Axis("columns")), torch.int8),
            "SCB": Companion((Axis("rows"),), torch.float32),
            "weight_format": Companion((), torch.uint8, is_optional=True),
        }

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> PackedWeight:
        if (order := raw.get("weight_format")) is not None and order.item():
            raise ValueError(f"weight_format is {order.item()}: only 0, rows, is supported")
        scale_O1 = raw["SCB"].unsqueeze(1) / 127
        code_OD = raw["weight"].int() + 128
        return self.packed(code_OD, scale_O1, -128 * scale_O1, None, extent)


def _whole(num: int) -> Companion:
    return Companion((), torch.float32, whole=(num, num))


def _parsed(text: Tensor) -> Mapping[str, Any]:
    """The JSON text of a `quant_state`. Raises ValueError."""
    try:
        found = json.loads(bytes(text.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its quant_state is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("its quant_state is not a JSON object")
    return found


def _require(state: Mapping[str, Any], **wanted: Any) -> None:
    for name, value in wanted.items():
        if (found := state.get(name)) != value:
            raise ValueError(f"its quant_state has {name} {found!r}, but {value!r} is needed")
