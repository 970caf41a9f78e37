"""Products of few rows in bf16 with packed weights that stream through shared memory, by
packed_stream.cu: of a weight, or of the experts of one token.

Shapes: T tokens | D depth | O weight rows | K experts of a token | P 1 or K rows of x
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.cuda import nvrtc, packed_linear, tensor_map
from nanovllm.kernels.cuda.nvrtc import Function, Launch
from nanovllm.kernels.cuda.packed_linear import DEEP, LARGE, ONE_GROUP, SCALES, aligned
from nanovllm.kernels.triton.common import launch_options, num_multiprocessors
from nanovllm.kernels.triton.packed_codes import Codes

# Up to so many rows of x the kernel is the fastest: for most weights, and for large ones
# (docs/log.md).
MOST_ROWS = 4
ROWS = (1, 4, 8, 16)
MAX_ROWS = ROWS[-1]
MAX_DIGIT_ROWS = 4  # with integers: two columns of the matrix units' eight for each row
# Half of a multiprocessor's, so that a program of the next kernel fits beside one of this.
HALF_SHARED_BYTES = 112 << 10
MAX_SHARED_BYTES = 226 << 10
MIN_ROW_BYTES = 1024  # of codes: below, most warps have nothing to do
MIN_EXPERT_BYTES = 384  # of a row of an expert
WARPS, SEGMENT, LINE = 8, 512, 128  # as in packed_stream.cu
STAGE_BYTES = 16 * SEGMENT
MIN_STAGES, MAX_STAGES = 4, 12
# Args in packed_stream.cu: a map, nine pointers, a stride, four sizes, eps; aligned to 64 bytes
_ARGUMENTS = struct.Struct(f"{tensor_map.NUM_BYTES}s9PQ4If28x")


class Form(NamedTuple):
    """What is multiplied. pairs: 0 a product, 1 a product for each of a token's experts, 2 the sum
    over them. num_rows: of x. halves: x is in fp16, else two bytes make a number."""

    pairs: int
    num_rows: int
    halves: bool

    @property
    def num_tiles(self) -> int:
        """Of eight rows that are multiplied together."""
        return 1 if self.pairs else max(1, -(-self.num_rows * self.num_digits // 8))

    @property
    def num_digits(self) -> int:
        return 1 if self.halves else 2

    def x_bytes(self, codes: Codes) -> int:
        """x in shared memory, and what the sums of its chunks are multiplied by."""
        depth, parts = depth_of(codes), self.num_rows if self.pairs == 2 else 1
        each = 2 if self.pairs else -(-self.num_rows * self.num_digits // 2) * 2
        columns = parts * depth // _chunk(codes) * each
        digits = self.num_rows * self.num_digits * (depth * 2 // self.num_digits + 16)
        return digits + (columns + 8) * 8


class Rings(NamedTuple):
    """How many stages of codes, and tiles' scales, are on their way in a program."""

    num_stages: int
    num_slots: int
    shared_bytes: int


class _Operands(NamedTuple):
    """Tensors and sizes of a launch."""

    x: Tensor
    codes: Codes
    out: Tensor
    norm: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    expert: Tensor | None = None
    factor: Tensor | None = None
    eps: float = 0.0
    silu_mul: bool = False
    top_k: int = 1


def takes(x_TD: Tensor, codes: Codes) -> bool:
    """True where the kernel fits and is the faster one."""
    num_rows = len(x_TD)
    is_deep = codes.bits == 4 and num_rows > 1 and depth_of(codes) >= DEEP
    is_fast = num_rows <= MOST_ROWS and not is_deep
    return (is_fast or codes.num_rows >= LARGE) and fits(x_TD, codes)


def fits(x_TD: Tensor, codes: Codes) -> bool:
    """True if the kernel can multiply rows of the dtype of x with the weight: integers of 4 or 8
    bits, or fp8, and x in bf16."""
    num_rows, is_weight = len(x_TD), codes.code.dim() == 2
    form = form_of(num_rows, codes)
    return num_rows <= MAX_ROWS and is_weight and _fits(x_TD, form, codes, MIN_ROW_BYTES)


def takes_experts(x_TD: Tensor, num_rows: int, codes: Codes) -> bool:
    """True if the kernel multiplies the experts of one token, which have so many rows of the dtype
    of x, and is the faster one."""
    return MOST_ROWS > 0 and fits_experts(x_TD, num_rows, codes)


def fits_experts(x_TD: Tensor, num_rows: int, codes: Codes) -> bool:
    """The same for the experts of one token, which have so many rows of the dtype of x."""
    form = Form(1 if num_rows == 1 else 2, num_rows, codes.is_fp8)
    return codes.code.dim() == 3 and _fits(x_TD, form, codes, MIN_EXPERT_BYTES)


def _fits(x_TD: Tensor, form: Form, codes: Codes, row_bytes: int) -> bool:
    is_taken = codes.table is None and packed_linear.takes(x_TD, codes)
    if not is_supported(x_TD.device) or not is_taken:
        return False
    scales = [codes.scale] + ([] if codes.offset is None else [codes.offset])
    return (
        codes.code.shape[-1] >= row_bytes
        and codes.code.shape[-1] % LINE == 0
        and codes.num_rows % 16 == 0
        and all(one.storage_offset() * one.element_size() % 16 == 0 for one in scales)
        and (codes.group_rows == 1 or codes.group_rows >= 8)
        and (codes.group >= depth_of(codes) or codes.group % _chunk(codes) == 0)
        and rings(form, codes).num_stages >= MIN_STAGES
    )


@functools.cache
def is_supported(device: torch.device) -> bool:
    """True for NVIDIA GPUs of compute capability 9.x and 10.x, whose shared memory is large."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device)[0] in (9, 10)


def form_of(num_rows: int, codes: Codes) -> Form:
    """Of a product with so many rows, up to 16. Few forms, so that few kernels are compiled."""
    rows = next((most for most in ROWS if num_rows <= most), num_rows)
    return Form(0, rows, codes.is_fp8 or rows > MAX_DIGIT_ROWS)


def depth_of(codes: Codes) -> int:
    return codes.code.shape[-1] * 8 // codes.bits


def _chunk(codes: Codes) -> int:
    """Columns of a warp in a stage."""
    return 512 // codes.bits


def rings(form: Form, codes: Codes) -> Rings:
    """As many stages as there is room for, and scales for the tiles that they cover."""
    half = codes.scale.shape[-1] * codes.scale.element_size() * (8 if codes.group_rows == 1 else 1)
    is_shifted = half % 16 != 0  # then more is copied, and a number says where scales begin
    slot = ((half + 30) // 16 * 16 if is_shifted else half) * (2 if codes.offset is None else 4)
    slot += 16 * is_shifted
    steps = -(-codes.code.shape[-1] // SEGMENT)
    # sums of two tiles, squares, x, and up to 1,024 bytes for the alignment
    sums = form.num_tiles * (2 * WARPS * 32 * 16 + WARPS * 8 * 4)
    others = sums + form.x_bytes(codes) + 1024

    def used(num_stages: int) -> tuple[int, int]:
        num_slots = 2 + (num_stages - 1) // steps
        barriers = (2 * num_stages + 2 * num_slots + 1) // 2 * 16
        return num_slots, num_stages * STAGE_BYTES + num_slots * slot + barriers + others

    most = HALF_SHARED_BYTES if used(MIN_STAGES)[1] <= HALF_SHARED_BYTES else MAX_SHARED_BYTES
    fitting = (num for num in range(MAX_STAGES, 0, -1) if used(num)[1] <= most)
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

    `fits` is true.
    """
    out_TO = _empty(x_TD, len(x_TD), codes, silu_mul)
    operands = _Operands(
        aligned(x_TD), codes, out_TO, norm_D, bias_O, residual_TO, eps=eps, silu_mul=silu_mul
    )
    _launch(form_of(len(x_TD), codes), operands)
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
    factors, [1, O], + residual. `fits_experts` is true.
    """
    top_k, adds = expert_1K.shape[1], factor_1K is not None
    out = _empty(x_PD, 1 if adds else top_k, codes, silu_mul)
    operands = _Operands(
        aligned(x_PD), codes, out, residual=residual_1O, expert=expert_1K, factor=factor_1K,
        silu_mul=silu_mul, top_k=top_k,
    )  # fmt: skip
    _launch(Form(2 if adds else 1, len(x_PD), codes.is_fp8), operands)
    return out


def _empty(x: Tensor, num_rows: int, codes: Codes, silu_mul: bool) -> Tensor:
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    return torch.empty((num_rows, num_outs), dtype=x.dtype, device=x.device)


def _launch(form: Form, operands: _Operands) -> None:
    codes, device = operands.codes, operands.x.device
    num_programs = min(num_tiles(form, operands), num_multiprocessors(device))
    shared_bytes, overlaps = rings(form, codes).shared_bytes, launch_options(device)["PDL"]
    how = Launch((num_programs, 1, 1), WARPS * 32 + 32, shared_bytes, overlaps)

    def packed_arguments() -> bytes:
        lines = codes.code.view(-1, codes.code.shape[-1] // LINE, LINE)
        return arguments(form, operands, tensor_map.encode(lines, (8, SEGMENT // LINE, LINE)))

    nvrtc.launch(function_of(form, operands), how, packed_arguments, device)


def num_tiles(form: Form, operands: _Operands) -> int:
    return operands.codes.num_rows // 16 * (operands.top_k if form.pairs == 1 else 1)


def arguments(form: Form, operands: _Operands, code_map: bytes) -> bytes:
    """The kernel's argument."""
    x, codes, out, norm, bias, residual, expert, factor = operands[:8]
    every = x, codes.scale, codes.offset, norm, bias, residual, expert, factor, out
    return _ARGUMENTS.pack(
        code_map, *(0 if one is None else one.data_ptr() for one in every), x.stride(0), len(x),
        out.shape[1], num_tiles(form, operands), codes.num_rows // 16, operands.eps,
    )  # fmt: skip


def function_of(form: Form, operands: _Operands) -> Function:
    """The kernel with its constants."""
    codes, depth = operands.codes, depth_of(operands.codes)
    ring, is_shallow = rings(form, codes), depth <= 2 * WARPS * 32 * 8
    values = {
        "BITS": codes.bits,
        "FP8": codes.is_fp8,
        "OFFSET": codes.offset is not None,
        "SCALE": SCALES[codes.scale.dtype],
        "HALVES": form.halves,
        "TILES": form.num_tiles,
        "MIN_PROGRAMS": 2 if ring.shared_bytes <= HALF_SHARED_BYTES else 1,
        "SINGLE": form.num_rows == 1,
        "AT_ONCE": 2 if form.num_rows > 1 and is_shallow else 1,
        "DEPTH": depth,
        "GROUP_SHIFT": ONE_GROUP if codes.group >= depth else codes.group.bit_length() - 1,
        "ROWS_SHIFT": codes.group_rows.bit_length() - 1,
        "NUM_GROUPS": codes.scale.shape[-1],
        "STAGES": ring.num_stages,
        "SLOTS": ring.num_slots,
        "SILU": operands.silu_mul,
        "NORM": operands.norm is not None,
        "PAIRS": form.pairs,
        "TOP_K": operands.top_k,
        "PDL": launch_options(operands.x.device)["PDL"],
    }
    return Function("packed_stream", nvrtc.constants(values))
