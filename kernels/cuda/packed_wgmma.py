"""Products in bf16 with packed weights by warpgroups, by packed_wgmma.cu: 9 to 256 rows on sm_90,
and experts whose pairs are sorted.

Shapes: T tokens | D depth | O weight rows | P pairs of a token and an expert | E experts
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.cuda import nvrtc, packed_linear, tensor_map
from nanovllm.kernels.cuda.nvrtc import Function, Launch
from nanovllm.kernels.cuda.packed_linear import DEEP, LARGE, MEDIUM, ONE_GROUP, SCALES, aligned
from nanovllm.kernels.triton.common import launch_options
from nanovllm.kernels.triton.packed_codes import E2M1, Codes

MIN_ROWS, MAX_ROWS = 9, 256
ROWS = (16, 32, 64, 80, 96, 112, 128)  # of x in a program
CHUNK = 128  # columns
MAX_SHARED_BYTES = 227 << 10
PLAIN = {"SILU": 0, "CLAMP": 0, "EXPERTS": 0, "OUT_BY_PLACE": 0}
# Args in packed_wgmma.cu: two maps, eight pointers, eight sizes, two numbers; aligned to 64 bytes
_ARGUMENTS = struct.Struct(f"{2 * tensor_map.NUM_BYTES}s8P8I2f24x")


class Tile(NamedTuple):
    """The sizes of a program: weight rows in units of 64, programs that share the depth, chunks on
    their way."""

    groups: int
    split: int
    num_stages: int


def takes(x_TD: Tensor, codes: Codes) -> bool:
    """True if the kernel can multiply rows of the dtype of x with the weight: integers of 4 or 8
    bits, and x in bf16."""
    depth = x_TD.shape[1]
    return (
        is_supported(x_TD.device)
        and packed_linear.takes(x_TD, codes)
        and codes.table is None
        and not codes.is_fp8
        and codes.code.dim() == 2
        and depth % 32 == 0
        and (codes.group >= depth or codes.group >= 32)
    )


@functools.cache
def is_supported(device: torch.device) -> bool:
    """True for NVIDIA GPUs of compute capability 9.0."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) == (9, 0)


RUNGS = (16, 32, 64, 128, MAX_ROWS)
# By rows of x (`RUNGS`) and by size (`_size_of`): the fastest of some tiles for
# the products of Qwen3-8B in int4 on an H100; None where packed_linear.cu is faster (docs/log.md).
TILES: tuple[tuple[Tile | None, ...], ...] = (
    (Tile(3, 2, 4), None, None, None),
    (Tile(3, 2, 4), None, None, None),
    (Tile(3, 1, 4), Tile(2, 4, 3), Tile(3, 4, 3), Tile(2, 6, 3)),
    (Tile(3, 1, 5), Tile(2, 2, 5), Tile(3, 8, 2), Tile(3, 8, 2)),
    (Tile(3, 1, 5), Tile(3, 2, 2), Tile(1, 2, 3), Tile(2, 2, 5)),
)


def tile_of(num_rows: int, codes: Codes, depth: int) -> Tile | None:
    """The sizes for a product of so many rows; None where another kernel is faster."""
    if not MIN_ROWS <= num_rows <= MAX_ROWS:
        return None
    rung = next(i for i, most in enumerate(RUNGS) if num_rows <= most)
    tile = TILES[rung][_size_of(codes.num_rows, depth)]
    if tile is None:
        return None
    split = min(tile.split, _power_below(-(-depth // CHUNK)))
    most = most_stages(rows_of_program(num_rows), tile.groups, codes.bits)
    return tile._replace(split=split, num_stages=min(tile.num_stages, most))


def _size_of(num_lines: int, depth: int) -> int:
    """0 for large products, 1 for medium ones, 2 for small and 3 for deep ones."""
    if num_lines >= LARGE:
        return 0
    return 1 if num_lines >= MEDIUM else 3 if depth >= DEEP else 2


def _power_below(number: int) -> int:
    return 1 << number.bit_length() - 1


def rows_of_program(num_rows: int) -> int:
    """More rows than 128 are shared by two programs."""
    each = num_rows if num_rows <= ROWS[-1] else -(-num_rows // 2)
    return next(most for most in ROWS if each <= most)


def _stage_bytes(rows: int, groups: int, bits: int) -> int:
    """Of a chunk of codes and of `rows` rows of x."""
    return 64 * groups * CHUNK * bits // 8 + rows * CHUNK * 2


def most_stages(rows: int, groups: int, bits: int) -> int:
    return (MAX_SHARED_BYTES - 2048) // _stage_bytes(rows, groups, bits)


def packed_wgmma(
    x_TD: Tensor,
    codes: Codes,
    tile: Tile,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """silu_mul(x · weightᵀ + bias) + residual; see `reference.packed`. `takes` is true."""
    num_rows, depth = x_TD.shape
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=x_TD.device)
    rows, x_TD = rows_of_program(num_rows), aligned(x_TD)
    x_tiles = -(-num_rows // rows)
    lines = 64 * tile.groups // (2 if silu_mul else 1)  # of a box
    grid = (-(-num_outs // lines) * x_tiles * tile.split, 1, 1)
    how = Launch(
        grid, 128 * tile.groups + 32, shared_bytes(tile, rows, codes.bits),
        launch_options(x_TD.device)["PDL"],
    )  # fmt: skip

    def arguments() -> bytes:
        x_map = tensor_map.encode(x_TD, (rows, CHUNK // 2))
        code_map = tensor_map.encode(codes.code, (lines, CHUNK * codes.bits // 8))
        tensors = codes.scale, codes.offset, bias_O, residual_TO, None, None, None, out_TO
        return arguments_of(x_map + code_map, tensors, codes, num_rows, depth, x_tiles)

    function = function_of(x_TD, codes, tile, rows, SILU=silu_mul)
    nvrtc.launch(function, how, arguments, x_TD.device)
    return out_TO


def shared_bytes(tile: Tile, rows: int, bits: int) -> int:
    """The ring with its barriers, or the sums of a part of the depth; and up to 1,024 for the
    alignment."""
    ring = tile.num_stages * (_stage_bytes(rows, tile.groups, bits) + 16)
    return max(ring, 64 * tile.groups * rows * 4 if tile.split > 1 else 0) + 1024


def function_of(x: Tensor, codes: Codes, tile: Tile, rows: int, **form: int) -> Function:
    """The program for so many rows of x; `form` has those of the constants in PLAIN that are not as
    there."""
    values = {
        "BITS": codes.bits,
        "E2M1": codes.form == E2M1.value,
        "OFFSET": codes.offset is not None,
        "SCALE": SCALES[codes.scale.dtype],
        "SCALES": 1 if codes.group >= x.shape[1] else max(1, CHUNK // codes.group),
        "GROUPS": tile.groups,
        "NR": rows,
        "STAGES": tile.num_stages,
        "SPLIT": tile.split,
        **PLAIN,
        **form,
        "PDL": launch_options(x.device)["PDL"],
    }
    return Function("packed_wgmma", nvrtc.constants(values), is_specific=True)


def arguments_of(
    maps: bytes,
    tensors: Sequence[Tensor | None],
    codes: Codes,
    num_rows: int,
    depth: int,
    num_tiles: int,
    clamp: tuple[float, float] = (0.0, 0.0),
) -> bytes:
    """Args of packed_wgmma.cu; `tensors` are those behind its pointers."""
    group_shift = ONE_GROUP if codes.group >= depth else codes.group.bit_length() - 1
    return _ARGUMENTS.pack(
        maps, *(0 if one is None else one.data_ptr() for one in tensors), num_rows, codes.num_rows,
        depth, group_shift, codes.group_rows.bit_length() - 1, codes.scale.shape[-1], num_tiles,
        len(codes.code), *clamp,
    )  # fmt: skip
