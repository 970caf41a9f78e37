"""Products of one or a few rows in bf16 with packed weights that stream through shared memory, by
packed_stream.cu.

Shapes: T tokens | D depth | O weight rows
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
from nanovllm.kernels.cuda.packed_linear import ONE_GROUP, SCALES, aligned
from nanovllm.kernels.triton.common import launch_options, num_multiprocessors
from nanovllm.kernels.triton.packed_codes import Codes

MAX_ROWS = 8  # of x: the matrix units take so many
FASTER_BITS = 8  # with codes of 4 bits, packed_linear.cu was faster (docs/log.md)
# Half of a multiprocessor's, so that a program of the next kernel fits beside one of this.
MAX_SHARED_BYTES = 112 << 10
MAX_X_BYTES = 33 << 10
MIN_ROW_BYTES = 1024  # of codes: below, most warps have nothing to do
MIN_EXPERT_BYTES = 384  # of a row of an expert
WARPS, SEGMENT, LINE = 8, 512, 128  # as in packed_stream.cu
STAGE_BYTES = 16 * SEGMENT
MIN_STAGES, MAX_STAGES = 4, 12
# Args in packed_stream.cu: a map, nine pointers, a stride, four sizes, eps; aligned to 64 bytes
_ARGUMENTS = struct.Struct(f"{tensor_map.NUM_BYTES}s9PQ4If28x")


class Rings(NamedTuple):
    """How many stages of codes, and tiles' scales, are on their way in a program."""

    num_stages: int
    num_slots: int
    shared_bytes: int


def takes(x_TD: Tensor, codes: Codes) -> bool:
    """True where the kernel fits and is the faster one."""
    return codes.bits == FASTER_BITS and fits(x_TD, codes)


def takes_experts(x_TD: Tensor, num_rows: int, codes: Codes) -> bool:
    """The same for the experts of one token, which have so many rows of the dtype of x."""
    return codes.bits == FASTER_BITS and fits_experts(x_TD, num_rows, codes)


def fits(x_TD: Tensor, codes: Codes) -> bool:
    """True if the kernel can multiply rows of the dtype of x with the weight: integers of 4 or 8
    bits, or fp8, and x in bf16."""
    return codes.code.dim() == 2 and _fits(x_TD, len(x_TD), codes, MIN_ROW_BYTES)


def fits_experts(x_TD: Tensor, num_rows: int, codes: Codes) -> bool:
    """The same for the experts of one token, which have so many rows of the dtype of x."""
    return codes.code.dim() == 3 and _fits(x_TD, num_rows, codes, MIN_EXPERT_BYTES)


def _fits(x_TD: Tensor, num_rows: int, codes: Codes, row_bytes: int) -> bool:
    is_taken = codes.table is None and packed_linear.takes(x_TD, codes)
    if not is_supported(x_TD.device) or not is_taken:
        return False
    depth = codes.code.shape[-1] * 8 // codes.bits
    scales = [codes.scale] + ([] if codes.offset is None else [codes.offset])
    scale_bytes = codes.scale.shape[-1] * codes.scale.element_size()
    return (
        num_rows <= MAX_ROWS
        and codes.code.shape[-1] >= row_bytes
        and codes.code.shape[-1] % LINE == 0
        and codes.num_rows % 16 == 0
        and all(one.storage_offset() * one.element_size() % 16 == 0 for one in scales)
        and (codes.group_rows == 1 or (codes.group_rows >= 8 and scale_bytes % 16 == 0))
        and num_rows * _x_pitch(depth) <= MAX_X_BYTES
        and rings(num_rows, codes, depth).num_stages >= MIN_STAGES
    )


@functools.cache
def is_supported(device: torch.device) -> bool:
    """True for NVIDIA GPUs of compute capability 9.x and 10.x, whose shared memory is large."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _x_pitch(depth: int) -> int:
    return depth * 2 + 32


def rings(num_rows: int, codes: Codes, depth: int) -> Rings:
    """As many stages as there is room for, and scales for the tiles that they cover."""
    half = codes.scale.shape[-1] * codes.scale.element_size() * (8 if codes.group_rows == 1 else 1)
    slot = half * (2 if codes.offset is None else 4)
    steps = -(-codes.code.shape[-1] // SEGMENT)
    # sums of two tiles, x, and up to 1,024 bytes for the alignment
    others = 2 * WARPS * 32 * 16 + num_rows * _x_pitch(depth) + 1024

    def used(num_stages: int) -> tuple[int, int]:
        num_slots = 2 + (num_stages - 1) // steps
        barriers = (2 * num_stages + 2 * num_slots + 1) // 2 * 16
        return num_slots, num_stages * STAGE_BYTES + num_slots * slot + barriers + others

    fitting = (num for num in range(MAX_STAGES, 0, -1) if used(num)[1] <= MAX_SHARED_BYTES)
    num_stages = next(fitting, 0)
    return Rings(num_stages, *used(num_stages))


def packed_stream(
    x_TD: Tensor,
    codes: Codes,
    *,
    norm_D: Tensor | None = None,
    eps: float = 0.0,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """silu_mul(rms_norm(x) · weightᵀ + bias) + residual; see `reference.packed`.

    `takes` is true; only one row may be normed.
    """
    num_rows = x_TD.shape[0]
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=x_TD.device)
    tensors = norm_D, bias_O, residual_TO, None, None, out_TO
    _launch(x_TD, codes, tensors, codes.num_rows // 16, eps, silu_mul, 0)
    return out_TO


def packed_stream_experts(
    x_PD: Tensor,
    codes: Codes,
    expert_1K: Tensor,
    *,
    silu_mul: bool = False,
    factor_1K: Tensor | None = None,
    residual_1O: Tensor | None = None,
) -> Tensor:
    """x · weightᵀ of each expert of one token [K, O], whose x is one row.

    With `factor_1K` x has a row for each expert, and the result is the sum of products times
    factors, [1, O], + residual. `takes_experts` is true.
    """
    top_k, adds = expert_1K.shape[1], factor_1K is not None
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    size = (1 if adds else top_k, num_outs)
    out = torch.empty(size, dtype=x_PD.dtype, device=x_PD.device)
    num_tiles = codes.num_rows // 16 * (1 if adds else top_k)
    tensors = None, None, residual_1O, expert_1K, factor_1K, out
    _launch(x_PD, codes, tensors, num_tiles, 0.0, silu_mul, top_k)
    return out


def _launch(
    x_TD: Tensor,
    codes: Codes,
    tensors: Sequence[Tensor | None],
    num_tiles: int,
    eps: float,
    silu_mul: bool,
    top_k: int,
) -> None:
    """`tensors` are norm, bias, residual, the experts and their factors, and the result."""
    norm, *_, factor, out = tensors
    (num_rows, depth), x_TD = x_TD.shape, aligned(x_TD)
    num_programs = min(num_tiles, num_multiprocessors(x_TD.device))
    how = Launch(
        (num_programs, 1, 1), WARPS * 32 + 32, rings(num_rows, codes, depth).shared_bytes,
        launch_options(x_TD.device)["PDL"],
    )  # fmt: skip

    def arguments() -> bytes:
        assert out is not None
        every = x_TD, codes.scale, codes.offset, *tensors
        lines = codes.code.view(-1, codes.code.shape[-1] // LINE, LINE)
        return _ARGUMENTS.pack(
            tensor_map.encode(lines, (8, SEGMENT // LINE, LINE)),
            *(0 if one is None else one.data_ptr() for one in every),
            x_TD.stride(0), num_rows, out.shape[1], num_tiles, codes.num_rows // 16, eps,
        )  # fmt: skip

    pairs = 0 if not top_k else 1 if factor is None else 2
    function = _function(x_TD, codes, silu_mul, norm is not None, pairs, top_k)
    nvrtc.launch(function, how, arguments, x_TD.device)


def _function(
    x_TD: Tensor, codes: Codes, silu_mul: bool, norm: bool, pairs: int = 0, top_k: int = 0
) -> Function:
    num_rows, depth = x_TD.shape
    ring = rings(num_rows, codes, depth)
    values = {
        "BITS": codes.bits,
        "FP8": codes.is_fp8,
        "OFFSET": codes.offset is not None,
        "SCALE": SCALES[codes.scale.dtype],
        "DEPTH": depth,
        "GROUP_SHIFT": ONE_GROUP if codes.group >= depth else codes.group.bit_length() - 1,
        "ROWS_SHIFT": codes.group_rows.bit_length() - 1,
        "NUM_GROUPS": codes.scale.shape[-1],
        "STAGES": ring.num_stages,
        "SLOTS": ring.num_slots,
        "SILU": silu_mul,
        "NORM": norm,
        "PAIRS": pairs,
        "TOP_K": top_k,
        "PDL": launch_options(x_TD.device)["PDL"],
    }
    return Function("packed_stream", nvrtc.constants(values))
