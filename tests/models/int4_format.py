"""A format of tests alone, which shows what formats can say: 4 bits, scales and zeros of groups.

In the checkpoint, `qweight` [D, O / 8] has 8 outputs in a word of 32 bits, `qzeros` [D / g, O / 8]
too, and `scales` is [D / g, O]. Stored are words of 8 inputs [O, D / 8]. So a rank's part can cut
words, along the rows, and groups, along the columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.formats.format import Axis, Companion, Extent, Format, Piece
from nanovllm.models.param import PACKABLE
from nanovllm.models.schemes import Modules, Packed

METHOD = "int4_of_tests"
PER_WORD, BITS = 8, 4


class Int4Weight(NamedTuple):
    """(value − zero) · scale; O outputs | W words of 8 inputs | G groups of inputs."""

    packed_OW: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    depth: int
    group: int

    def real(self, dtype: torch.dtype) -> Tensor:
        """All numbers [.., O, D]."""

        def spread(x_OG: Tensor) -> Tensor:
            return x_OG.repeat_interleave(self.group, -1)[..., : self.depth]

        value_OD = unpacked(self.packed_OW)[..., : self.depth]
        return ((value_OD - spread(self.zero_OG).float()) * spread(self.scale_OG)).to(dtype)

    def linear(self, x_TD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
        return ops.linear(x_TD, self.real(x_TD.dtype), bias_O, residual_TO)

    def rows(self, first: int) -> Tensor:
        return self.real(torch.float32)[first:]

    def expert_linear(self, x: Tensor, expert_TK: Tensor) -> Tensor:
        return ops.expert_linear(x, expert_TK, self.real(x.dtype))

    def lookup(self, row_T: Tensor, dtype: torch.dtype) -> Tensor:
        tensors = (one.index_select(0, row_T) for one in self[:3])
        return Int4Weight(*tensors, self.depth, self.group).real(dtype)


@dataclass(frozen=True)
class Int4(Format):
    """Groups that `must_be_whole` cannot be cut; with `joins` off sources stay by themselves."""

    group: int
    must_be_whole: bool = False
    joins: bool = True
    name: ClassVar[str] = METHOD
    kinds: ClassVar[frozenset[str]] = PACKABLE

    @property
    def is_packed(self) -> bool:
        return True

    @property
    def joins_sources(self) -> bool:
        return self.joins

    def refusal(self, extent: Extent) -> str | None:
        if not self.must_be_whole or extent.column_block(self.group) == self.group:
            return None
        return f"its shares of {extent.shape[-1]} columns cut groups of {self.group}"

    def empty(self, extent: Extent, device: torch.device | str) -> Int4Weight:
        *outer, depth = extent.shape
        group = extent.column_block(self.group)
        packed = torch.empty(*outer, -(-depth // PER_WORD), dtype=torch.int32, device=device)
        scale = packed.new_empty(*outer, -(-depth // group), dtype=torch.float32)
        return Int4Weight(packed, scale, scale.to(torch.uint8), depth, group)

    def quantized(self, name: str, weight_OD: Tensor, extent: Extent) -> Int4Weight:
        depth, group = weight_OD.shape[1], extent.column_block(self.group)
        value_OD, scale_OG, zero_OG = rounded(weight_OD.float(), group)
        return Int4Weight(packed(value_OD), scale_OG, zero_OG.to(torch.uint8), depth, group)

    def companions(self, shape: tuple[int, int]) -> Mapping[str, Companion]:
        rows, groups = Axis("rows", PER_WORD), Axis("columns", self.group)
        return {
            "qweight": Companion((Axis("columns"), rows), torch.int32),
            "scales": Companion((groups, Axis("rows")), torch.float32),
            "qzeros": Companion((groups, rows), torch.int32),
            "note": Companion((), torch.float32, is_optional=True, is_unread=True),
        }

    def read(self, raw: Mapping[str, Tensor], piece: Piece, extent: Extent) -> Int4Weight:
        if not raw["scales"].isfinite().all():
            raise ValueError("a scale is NaN or infinite")
        (num_rows, depth), group = piece.size, extent.column_block(self.group)
        first_row = piece.rows.start % PER_WORD
        first_group = piece.columns.start % self.group // group

        def of_groups(x_GO: Tensor) -> Tensor:
            """In the smaller groups, from the first one of the piece on."""
            x_OG = x_GO.T.repeat_interleave(self.group // group, 1)
            return x_OG[:, first_group : first_group + -(-depth // group)].contiguous()

        def of_rows(words: Tensor) -> Tensor:
            return unpacked(words)[:, first_row : first_row + num_rows]

        zero_OG = of_groups(of_rows(raw["qzeros"])).to(torch.uint8)
        packed_OW = packed(of_rows(raw["qweight"]).T)
        return Int4Weight(packed_OW, of_groups(raw["scales"]), zero_OG, depth, group)

    def scaled(self, weight: Int4Weight, factor: float) -> Int4Weight:
        return weight._replace(scale_OG=weight.scale_OG * factor)


def scheme(config: Mapping[str, Any]) -> Packed:
    plain = Modules(config.get("modules_to_not_convert") or ())
    stored = Int4(config["group_size"], bool(config.get("whole")), not config.get("apart"))
    return Packed(METHOD, stored, plain, bool(config.get("lm_head")), bool(config.get("table")))


def unpacked(words: Tensor) -> Tensor:
    """The numbers of words along the last axis, the first one lowest."""
    shift = torch.arange(0, PER_WORD * BITS, BITS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shift) & 15).flatten(-2)


def packed(values: Tensor) -> Tensor:
    """Words of 8 numbers along the last axis; zeros fill the last one."""
    padded = torch.nn.functional.pad(values.int(), (0, -values.shape[-1] % PER_WORD))
    shift = torch.arange(0, PER_WORD * BITS, BITS, dtype=torch.int32, device=values.device)
    return (padded.unflatten(-1, (-1, PER_WORD)) << shift).sum(-1, dtype=torch.int32)


def rounded(weight_OD: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values [O, D], scales and zeros [O, G], by the smallest and largest numbers of groups."""
    depth = weight_OD.shape[-1]
    padded = torch.nn.functional.pad(weight_OD, (0, -depth % group))
    grouped_OGg = padded.unflatten(-1, (-1, group))
    low, high = grouped_OGg.amin(-1).clamp(max=0.0), grouped_OGg.amax(-1).clamp(min=0.0)
    scale_OG = ((high - low) / 15).clamp(min=1e-8)
    zero_OG = (-low / scale_OG).round()
    value = (grouped_OGg / scale_OG.unsqueeze(-1)).round() + zero_OG.unsqueeze(-1)
    return value.clamp(0, 15).flatten(-2)[..., :depth], scale_OG, zero_OG


# checkpoints -------------------------------------------------------------------------------------


def write(
    folder: Path,
    target: Path,
    is_packed: Callable[[str], bool],
    of_matrix: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]],
    quantization: dict[str, Any],
    stacked_name: str = "{name}_{end}",
) -> Path:
    """Write a checkpoint with its matrices packed, and beside it, in `target` / "real", one with
    the numbers that these stand for. Returns the packed one.

    `of_matrix` gives the companions of a matrix and these numbers. `stacked_name` is the name of a
    companion of several experts."""
    weights, real = load_file(folder / "model.safetensors"), {}
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not is_packed(name):
            found[name] = real[name] = weight
            continue
        matrices = weight if weight.dim() == 3 else weight.unsqueeze(0)
        parts = [of_matrix(matrix) for matrix in matrices]
        is_stack = weight.dim() == 3
        real[name] = torch.stack([r for _, r in parts]) if is_stack else parts[0][1]
        module = name.removesuffix("weight")
        for end in parts[0][0]:
            full = stacked_name.format(name=name, end=end) if is_stack else module + end
            found[full] = torch.stack([p[end] for p, _ in parts]) if is_stack else parts[0][0][end]
    described = json.loads((folder / "config.json").read_text())
    for at, tensors, more in (
        (target, found, {"quantization_config": quantization}),
        (target / "real", real, {}),
    ):
        at.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: x.contiguous() for name, x in tensors.items()}, at / "model.safetensors",
            {"format": "pt"},
        )  # fmt: skip
        (at / "config.json").write_text(json.dumps({**described, **more}))
    return target


def of_matrix(weight_OD: Tensor, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """The companions of a matrix, and the numbers they stand for."""
    value_OD, scale_OG, zero_OG = rounded(weight_OD.float(), group)
    scale_OG = scale_OG.half().float()

    def spread(x_OG: Tensor) -> Tensor:
        return x_OG.repeat_interleave(group, -1)[:, : weight_OD.shape[1]]

    companions = {
        "qweight": packed(value_OD.T),
        "qzeros": packed(zero_OG.T),
        "scales": scale_OG.T.half(),
        "note": torch.ones(3),
    }
    return companions, ((value_OD - spread(zero_OG)) * spread(scale_OG)).to(weight_OD.dtype)
