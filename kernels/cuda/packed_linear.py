"""Products of few rows in bf16 with packed weights, by packed_linear.cu.

One to 64 rows of a weight; pairs of a token and an expert, one by one or sorted by expert.

Shapes: T tokens | D depth | O weight rows | K experts per token
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.cuda import nvrtc
from nanovllm.kernels.cuda.nvrtc import Function, Launch
from nanovllm.kernels.triton.common import launch_options
from nanovllm.kernels.triton.packed_codes import E2M1, Codes

MAX_ROWS = 64
ROWS = (8, 16, 32, 64)  # of x in a launch
# Up to so many rows of x, and bytes of them, are normed in each program.
MAX_NORMED_ROWS, MAX_NORMED_BYTES = 8, 20 << 10
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ONE_GROUP = 31  # the shift of columns if a row has one scale
PLAIN = {
    "SILU": 0, "NORM": 0, "CLAMP": 0, "PAIRS": 0, "TOP_K": 1, "X_BY_PLACE": 0, "OUT_BY_PLACE": 0
}  # fmt: skip
# Args in packed_linear.cu: twelve pointers, the stride of x, seven sizes, three numbers
_ARGUMENTS = struct.Struct("12PQ7I3f")


class Tile(NamedTuple):
    """The sizes of a program: weight rows of a warp in units of 16, warps that share the depth,
    chunks of a warp on their way, warps that share rows of x, programs of a multiprocessor."""

    units: int
    depth_warps: int
    num_stages: int
    row_warps: int = 1
    min_programs: int = 1

    @property
    def num_warps(self) -> int:
        return self.depth_warps * self.row_warps


def takes(x_TD: Tensor, codes: Codes) -> bool:
    """True if the kernel can multiply rows of the dtype of x with the weight: integers of 4 or 8
    bits, fp8 or e2m1, and x in bf16."""
    depth, columns = codes.code.shape[-1] * 8 // codes.bits, 128 // codes.bits
    return (
        is_supported(x_TD.device)
        and x_TD.dtype is torch.bfloat16
        and (codes.table is None or codes.form == E2M1.value)
        and codes.scale.dtype in SCALES
        and (codes.offset is None or codes.offset.dtype is codes.scale.dtype)
        and (codes.group >= depth or (_is_power(codes.group) and codes.group >= columns))
        and _is_power(codes.group_rows)
    )


def takes_norm(x_TD: Tensor) -> bool:
    """Whether the product is faster if it norms rows of x itself."""
    num_rows, depth = x_TD.shape
    is_small = num_rows <= MAX_NORMED_ROWS and num_rows * depth * 2 <= MAX_NORMED_BYTES
    return num_rows == 1 or is_small


@functools.cache
def is_supported(device: torch.device) -> bool:
    """True for NVIDIA GPUs of compute capability 8.0 and later."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


# Weight rows from which on a product is large, and medium: an H200 has 132 multiprocessors.
LARGE, MEDIUM = 16384, 5120
DEEP = 8192
# By rows of x (up to 8, 16, 32, 64) and by size: the fastest of some tiles for the products of
# Qwen3-8B on an H200 (docs/log.md).
INTEGER_TILES = (
    (Tile(2, 4, 2), Tile(2, 8, 2, min_programs=2), Tile(2, 16, 1)),
    (Tile(1, 4, 2, 4), Tile(1, 4, 2, 4), Tile(1, 8, 2, 2)),
    (Tile(1, 4, 2, 4), Tile(1, 4, 2, 4), Tile(1, 8, 2, 2)),
    (Tile(2, 4, 1, 2), Tile(2, 4, 1, 2), Tile(1, 4, 2, 2)),
)
FP8_TILES = (
    (Tile(4, 4, 2, min_programs=2), Tile(1, 8, 2, min_programs=2), Tile(1, 8, 4)),
    (Tile(2, 8, 2, 2), Tile(2, 8, 2, 2), Tile(1, 8, 2, 2)),
    (Tile(2, 8, 1, 2), Tile(2, 8, 1, 2), Tile(1, 8, 2, 2)),
    (Tile(2, 4, 2, 2), Tile(2, 4, 2, 2), Tile(2, 8, 2)),
)


def tile_of(num_rows: int, codes: Codes, depth: int) -> Tile:
    """The sizes for a product of so many rows."""
    rung = next(i for i, most in enumerate(ROWS) if num_rows <= most)
    size = 0 if codes.num_rows >= LARGE else 1 if codes.num_rows >= MEDIUM else 2
    if codes.bits == 4:
        is_deep = rung == 0 and size == 2 and depth >= DEEP
        return Tile(2, 16, 2) if is_deep else INTEGER_TILES[rung][size]
    if rung < 2 and size == 2 and depth >= DEEP:
        return Tile(2, 16, 2 - rung)
    return FP8_TILES[rung][size]


def packed_linear(
    x_TD: Tensor,
    codes: Codes,
    *,
    norm_D: Tensor | None = None,
    eps: float = 0.0,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    silu_mul: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """silu_mul(rms_norm(x) · weightᵀ + bias) + residual; see `reference.packed`.

    `takes` is true and T ≤ 64, with a norm `takes_norm` too. `tile` overrides the sizes.
    """
    num_rows, depth = x_TD.shape
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=x_TD.device)
    tile = tile or tile_of(num_rows, codes, depth)
    x_TD = aligned(x_TD)
    row_tiles = next(most for most in ROWS if num_rows <= most) // 8
    norm = 0 if norm_D is None else 1 if num_rows == 1 else 2
    function = function_of(x_TD, codes, tile, row_tiles, SILU=silu_mul, NORM=norm)
    outs = tile.units * tile.row_warps * (8 if silu_mul else 16)
    grid = (-(-num_outs // outs), 1, 1)
    arguments = functools.partial(
        arguments_of, x_TD, codes, out_TO, norm=norm_D, bias=bias_O, residual=residual_TO,
        num_rows=num_rows, eps=eps,
    )  # fmt: skip
    num_bytes = shared_bytes(tile, num_rows, codes, 0 if norm_D is None else depth)
    nvrtc.launch(function, launch_of(grid, tile, num_bytes, x_TD), arguments, x_TD.device)
    return out_TO


def shared_bytes(tile: Tile, num_rows: int, codes: Codes, normed: int) -> int:
    """Bytes of shared memory for a product; `normed` columns of x are normed first, if any."""
    row_tiles = next(most for most in ROWS if num_rows <= most) // 8
    num_bytes = tile.num_warps * tile.units * row_tiles * 512  # sums
    if row_tiles > 1:  # two stages of x
        columns = 512 // codes.bits
        num_bytes = max(num_bytes, 2 * tile.depth_warps * 8 * row_tiles * columns * 2)
    if normed:
        num_bytes = max(num_bytes, num_rows * (normed + 8) * 2 + tile.num_warps * 4)
    return num_bytes


def packed_pairs(
    x_PD: Tensor,
    codes: Codes,
    expert_TK: Tensor,
    *,
    x_shared_by: int = 1,
    silu_mul: bool = False,
    factor_TK: Tensor | None = None,
    residual_TO: Tensor | None = None,
    bias_EO: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """x · weightᵀ + bias of the expert of each pair [P, O]; `x_shared_by` pairs share a row of x.

    With `factor_TK` the sum of each token's pairs times their factors, [T, O], + residual. With
    `clamp`, (alpha, limit), `silu_mul` is `reference.norm_act.clamped_swiglu`.
    """
    num_tokens, top_k = expert_TK.shape
    adds, x_PD = factor_TK is not None, aligned(x_PD)
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    num_out_rows = num_tokens if adds else num_tokens * top_k
    out = torch.empty((num_out_rows, num_outs), dtype=x_PD.dtype, device=x_PD.device)
    tile = tile or (_sum_tile(top_k) if adds else Tile(2, 4, 2))
    function = function_of(
        x_PD, codes, tile, 1, SILU=silu_mul, CLAMP=clamp is not None, PAIRS=2 if adds else 1,
        TOP_K=top_k if adds else 1,
    )  # fmt: skip
    outs = tile.units * tile.row_warps * (8 if silu_mul else 16)
    grid = (-(-num_outs // outs), num_out_rows, 1)
    arguments = functools.partial(
        arguments_of, x_PD, codes, out, bias=bias_EO, residual=residual_TO, expert=expert_TK,
        factor=factor_TK, num_rows=1, x_shared_by=x_shared_by, clamp=clamp or (0.0, 0.0),
    )  # fmt: skip
    num_bytes = tile.num_warps * tile.units * 512
    nvrtc.launch(function, launch_of(grid, tile, num_bytes, x_PD), arguments, x_PD.device)
    return out


def _sum_tile(top_k: int) -> Tile:
    """Of the sum over a token's pairs: few pairs leave a warp to each, so several share one."""
    return Tile(2, 4 * top_k, 2) if top_k <= 4 else Tile(1, 8, 2)


def aligned(x_TD: Tensor) -> Tensor:
    """x with rows that begin at multiples of 16 bytes."""
    if x_TD.stride(1) != 1 or x_TD.stride(0) % 8 or x_TD.storage_offset() % 8:
        return x_TD.clone(memory_format=torch.contiguous_format)
    return x_TD


def function_of(x: Tensor, codes: Codes, tile: Tile, row_tiles: int, **form: int) -> Function:
    """The program for rows of x in so many tiles of 8; `form` has those of the constants in PLAIN
    that are not as there."""
    values = {
        "BITS": codes.bits,
        "FP8": codes.is_fp8,
        "E2M1": codes.form == E2M1.value,
        "OFFSET": codes.offset is not None,
        "SCALE": SCALES[codes.scale.dtype],
        "NT": row_tiles,
        "M": tile.units,
        "WK": tile.depth_warps,
        "WR": tile.row_warps,
        "MIN_PROGRAMS": tile.min_programs,
        "STAGES": tile.num_stages,
        **PLAIN,
        **form,
        "PDL": launch_options(x.device)["PDL"],
    }
    return Function("packed_linear", nvrtc.constants(values))


def launch_of(grid: tuple[int, int, int], tile: Tile, shared_bytes: int, x: Tensor) -> Launch:
    return Launch(grid, tile.num_warps * 32, shared_bytes, launch_options(x.device)["PDL"])


def arguments_of(
    x: Tensor,
    codes: Codes,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    expert: Tensor | None = None,
    factor: Tensor | None = None,
    pair: Tensor | None = None,
    start: Tensor | None = None,
    num_rows: int,
    x_shared_by: int = 1,
    eps: float = 0.0,
    clamp: tuple[float, float] = (0.0, 0.0),
) -> bytes:
    """Args of packed_linear.cu."""
    depth = x.shape[1]
    tensors = (
        x, codes.code, codes.scale, codes.offset, norm, bias, residual, expert, factor, pair, start,
        out,
    )  # fmt: skip
    group_shift = ONE_GROUP if codes.group >= depth else codes.group.bit_length() - 1
    return _ARGUMENTS.pack(
        *(0 if one is None else one.data_ptr() for one in tensors),
        x.stride(0),
        num_rows,
        codes.num_rows,
        depth,
        group_shift,
        codes.group_rows.bit_length() - 1,
        codes.scale.shape[-1],
        x_shared_by,
        eps,
        *clamp,
    )
