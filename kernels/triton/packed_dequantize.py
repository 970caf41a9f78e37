"""The real values of packed weights, in Triton.

Shapes: O weight rows | D depth | L weight rows of a tile | H bytes of a chunk of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import (
    launch_options,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)
from nanovllm.kernels.triton.packed_chunks import columns_of, lines_of, scales_of
from nanovllm.kernels.triton.packed_codes import FP8, Codes
from nanovllm.kernels.triton.packed_numbers import numbers, times
from nanovllm.kernels.triton.packed_tiles import gemm_tile


@triton.jit
def dequantize_kernel(
    code_ptr,  # [O, C]
    scale_ptr,  # [R, G]
    offset_ptr,  # [R, G], read if HAS_OFFSET
    table_ptr,
    out_ptr,  # [NUM_OUTS, D], written
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """The real values of LINES rows and EACH chunks of columns."""
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    HALF: tl.constexpr = COLUMNS * BITS // 8
    line_L = lines_of(tl.program_id(0) * LINES, NUM_OUTS, LINES, False)
    at_LH = line_L.to(tl.int64)[:, None] * DEPTH + columns_of(HALF, BITS)[None, :]
    code_at = code_ptr + (
        line_L.to(tl.int64)[:, None] * (DEPTH * BITS // 8) + tl.arange(0, HALF)[None, :]
    )
    for i in tl.static_range(EACH):
        chunk = tl.program_id(1) * EACH + i
        if chunk * COLUMNS < DEPTH:
            scales = scales_of(
                scale_ptr, 0, line_L, chunk * COLUMNS, DEPTH - 1, COLUMNS, BITS, GROUP, GROUP_ROWS,
                NUM_GROUPS, 1, 1, GROUP_ROWS * 2, UPCAST,
            )  # fmt: skip
            offsets = (tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32))
            if HAS_OFFSET:
                offsets = scales_of(
                    offset_ptr, 0, line_L, chunk * COLUMNS, DEPTH - 1, COLUMNS, BITS, GROUP,
                    GROUP_ROWS, NUM_GROUPS, 1, 1, GROUP_ROWS * 2, UPCAST,
                )  # fmt: skip
            values = numbers(
                tl.load(code_at + chunk * HALF), scales, offsets, table_ptr, dtype, BITS, FORM,
                True, UPCAST,
            )  # fmt: skip
            for h in tl.static_range(8 // BITS):
                value = values[h].to(tl.float32) * times(dtype, BITS, FORM, GROUP, UPCAST)
                if FORM == FP8:
                    value *= scales[0].to(tl.float32)
                tl.store(out_ptr + at_LH + chunk * COLUMNS + 16 * h, value.to(dtype))


def dequantize(codes: Codes, depth: int, dtype: torch.dtype) -> Tensor:
    """The real values [O, D] of a weight, or of some of its rows."""
    tile = gemm_tile(1, codes, depth, shared_memory_bytes(codes.code.device))
    lines, each, num_outs = 64, max(1, 512 // tile.columns), codes.num_rows
    out_OD = torch.empty((num_outs, depth), dtype=dtype, device=codes.code.device)
    grid = (triton.cdiv(num_outs, lines), triton.cdiv(depth, tile.columns * each))
    dequantize_kernel[grid](
        codes.code,
        *codes.tensors(),
        out_OD,
        NUM_OUTS=num_outs,
        DEPTH=depth,
        **codes.constants(),
        LINES=lines,
        COLUMNS=tile.columns,
        EACH=each,
        UPCAST=codes.code.device.type != "cuda",
        num_warps=4,
        **launch_options(codes.code.device),
    )
    return out_OD
