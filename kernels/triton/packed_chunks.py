"""Chunks of packed weights on the matrix units: device functions in Triton.

Codes go to shared memory as they are, become numbers in registers, with scale and offset, rounded
to x's dtype, and are the left operand of the matrix units; the rows are the right operand, which
may have as few as 8. A byte has codes of columns j and j + 16, so a chunk of 4 bits is two products
with two halves of the columns. Numbers in fp8 are exact, and their scales multiply the sums of a
chunk in fp32. A chunk has the columns of one scale (or a part of them).

Shapes: T rows (tokens) | L weight rows of a tile | H bytes of a chunk of a row
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info

from nanovllm.kernels.triton.common import dot, finish
from nanovllm.kernels.triton.packed_codes import FP8
from nanovllm.kernels.triton.packed_numbers import numbers, times


@triton.jit
def _load_scale(ptr, UPCAST: tl.constexpr):
    """A scale of each weight row, loaded so that the compiler treats it as arithmetic.

    The layout of a plain load of 128 rows or more would become that of the codes: a row of codes
    for each thread, which is then written to shared memory in pieces of two bytes.
    """
    if UPCAST or not target_info.is_cuda():
        return tl.load(ptr)
    elif ptr.dtype.element_ty == tl.float32:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [ptr], dtype=tl.float32, is_pure=True, pack=1
        )
    elif ptr.dtype.element_ty == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b16 $0, [$1];", "=h,l", [ptr], dtype=tl.bfloat16, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b16 $0, [$1];", "=h,l", [ptr], dtype=tl.float16, is_pure=True, pack=1
        )


@triton.jit
def scales_of(at, first_line, line_L, column, end_column, COLUMNS: tl.constexpr,
              BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
              NUM_GROUPS: tl.constexpr, EACH: tl.constexpr, UP: tl.constexpr,
              OUTS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """The scales, or the offsets, of the EACH chunks from `column` on: [L, 1] for each of them, or
    for each half of its columns if those have groups of their own, or [L, n] for n groups of 32.
    Behind the end: the last ones.

    If all outputs of a tile share a block of rows, one number is loaded, or one for gate and one
    for up, whose rows are UP rows further on.
    """
    found = ()
    for i in tl.static_range(EACH):
        for h in tl.static_range(2 if GROUP == 16 and BITS == 4 else 1):
            group = tl.minimum(column + i * COLUMNS + 16 * h, end_column) // GROUP
            if GROUP_ROWS % OUTS == 0 and UP % OUTS == 0:
                one = tl.load(at + first_line // GROUP_ROWS * NUM_GROUPS + group).to(tl.float32)
                if UP > 0:
                    up = tl.load(at + (first_line + UP) // GROUP_ROWS * NUM_GROUPS + group)
                    is_up_L1 = (tl.arange(0, line_L.shape[0]) // 8 % 2 == 1)[:, None]
                    one = tl.where(is_up_L1, up.to(tl.float32), one)
            elif GROUP == 32 and COLUMNS > 32:
                last = tl.minimum(column + i * COLUMNS, end_column + 1 - COLUMNS) // GROUP
                group_1n = last + tl.arange(0, COLUMNS // GROUP)[None, :]
                one = _load_scale(at + line_L[:, None] * NUM_GROUPS + group_1n, UPCAST)
            else:
                one = _load_scale(at + (line_L // GROUP_ROWS)[:, None] * NUM_GROUPS + group, UPCAST)
            found += (one,)
    return found


@triton.jit
def packed_dot(
    acc_LT, code_at, x_at, scales, offsets, table_ptr, byte, column, real_T1, dtype: tl.constexpr,
    BITS: tl.constexpr, FORM: tl.constexpr, ALL_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + weight · xᵀ of one chunk, which begins at so many bytes and columns of a row."""
    # Assembly that is not pure keeps the layout of the loads, which is better for tiles of 8 rows.
    # For others it is the same on sm_90, and on sm_100 the compiler cannot pipeline it.
    IS_PURE: tl.constexpr = acc_LT.shape[1] > 8
    values = numbers(
        tl.load(code_at + byte), scales, offsets, table_ptr, dtype, BITS, FORM, IS_PURE, UPCAST
    )
    sum_LT = acc_LT
    if FORM == FP8:
        sum_LT = tl.zeros(acc_LT.shape, tl.float32)
    for h in tl.static_range(8 // BITS):
        if ALL_ROWS:
            x_TH = tl.load(x_at + column + 16 * h)
        else:
            x_TH = tl.load(x_at + column + 16 * h, mask=real_T1, other=0.0)
        sum_LT = dot(values[h], tl.trans(x_TH), sum_LT, UPCAST)
    return acc_LT + sum_LT * scales[0].to(tl.float32) if FORM == FP8 else sum_LT


@triton.jit
def packed_sums(
    acc_LT, code_ptr, scale_ptr, offset_ptr, table_ptr, x_at, first_line, line_L, real_T, first,
    dtype: tl.constexpr, STEPS: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr,
    FORM: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, NUM_GROUPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr, STAGES: tl.constexpr,
    UP: tl.constexpr, LINES: tl.constexpr, ALL_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + weight · xᵀ of STEPS · EACH chunks from the chunk `first` on.

    The scales of a step are loaded a step before, since the compiler overlaps no loads of 2 bytes.
    """
    HALF: tl.constexpr = COLUMNS * BITS // 8
    OUTS: tl.constexpr = LINES // 2 if UP > 0 else LINES
    NUM: tl.constexpr = 2 if GROUP == 16 and BITS == 4 else 1
    code_at = code_ptr + (
        line_L.to(tl.int64)[:, None] * (DEPTH * BITS // 8) + tl.arange(0, HALF)[None, :]
    )
    column = first * COLUMNS
    scales = scales_of(
        scale_ptr, first_line, line_L, column, DEPTH - 1, COLUMNS, BITS, GROUP, GROUP_ROWS,
        NUM_GROUPS, EACH, UP, OUTS, UPCAST,
    )  # fmt: skip
    offsets = ()
    for _ in tl.static_range(0 if HAS_OFFSET else EACH * NUM):
        offsets += (tl.zeros((1, 1), tl.float32),)
    if HAS_OFFSET:
        offsets = scales_of(
            offset_ptr, first_line, line_L, column, DEPTH - 1, COLUMNS, BITS, GROUP, GROUP_ROWS,
            NUM_GROUPS, EACH, UP, OUTS, UPCAST,
        )  # fmt: skip
    for step in tl.range(0, STEPS, num_stages=STAGES):
        column = (first + step * EACH) * COLUMNS
        next_scales = scales_of(
            scale_ptr, first_line, line_L, column + EACH * COLUMNS, DEPTH - 1, COLUMNS, BITS, GROUP,
            GROUP_ROWS, NUM_GROUPS, EACH, UP, OUTS, UPCAST,
        )  # fmt: skip
        if HAS_OFFSET:
            next_offsets = scales_of(
                offset_ptr, first_line, line_L, column + EACH * COLUMNS, DEPTH - 1, COLUMNS, BITS,
                GROUP, GROUP_ROWS, NUM_GROUPS, EACH, UP, OUTS, UPCAST,
            )  # fmt: skip
        for i in tl.static_range(EACH):
            acc_LT = packed_dot(
                acc_LT, code_at, x_at, scales[i * NUM : i * NUM + NUM],
                offsets[i * NUM : i * NUM + NUM], table_ptr, (first + step * EACH + i) * HALF,
                column + i * COLUMNS, real_T[:, None], dtype, BITS, FORM, ALL_ROWS, UPCAST,
            )  # fmt: skip
        scales = next_scales
        if HAS_OFFSET:
            offsets = next_offsets
    return acc_LT * times(dtype, BITS, FORM, GROUP, UPCAST)


@triton.jit
def columns_of(HALF: tl.constexpr, BITS: tl.constexpr):
    """The columns of the lower codes of a chunk's bytes, from its first column on."""
    i_H = tl.arange(0, HALF)
    if BITS == 4:
        return i_H // 16 * 32 + i_H % 16
    else:
        return i_H


@triton.jit
def lines_of(first, NUM_OUTS: tl.constexpr, LINES: tl.constexpr, SILU_MUL: tl.constexpr):
    """The weight rows of a tile: with SILU_MUL 8 of gate, the same 8 of up, and on. Rows behind the
    last are the last."""
    i_L = tl.arange(0, LINES)
    if SILU_MUL:
        out_L = first + i_L // 16 * 8 + i_L % 8
        return tl.minimum(out_L, NUM_OUTS - 1) + i_L // 8 % 2 * NUM_OUTS
    else:
        return tl.minimum(first + i_L, NUM_OUTS - 1)


@triton.jit
def results_of(acc_LT, dtype: tl.constexpr, SILU_MUL: tl.constexpr, ALPHA: tl.constexpr = 0.0,
               LIMIT: tl.constexpr = 0.0):  # fmt: skip
    """A tile's results in `dtype`: the sums, or an activation of them (see `finish`)."""
    if SILU_MUL:
        LINES: tl.constexpr = acc_LT.shape[0]
        ROWS: tl.constexpr = acc_LT.shape[1]
        pairs = tl.permute(tl.reshape(acc_LT, (LINES // 16, 2, 8, ROWS)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        return tl.reshape(finish(gate, up, dtype, True, ALPHA, LIMIT), (LINES // 2, ROWS))
    else:
        return acc_LT.to(dtype)
