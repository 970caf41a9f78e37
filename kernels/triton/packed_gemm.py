"""Products of some rows with packed weights on the matrix units, in Triton.

x · weightᵀ + bias (→ SiLU·up) (+ residual). Codes go to shared memory as they are, become numbers
in registers, with scale and offset, rounded to x's dtype, and are the left operand of the matrix
units; the rows are the right operand, which may have as few as 8. A byte has codes of columns j and
j + 16, so a chunk of 4 bits is two products with two halves of the columns. Numbers in fp8 are
exact, and their scales multiply the sums of a chunk in fp32.

A chunk has the columns of one scale (or a part of them). The depth is split between programs by the
weight's shape alone, up to 64 rows, and the last program to arrive adds the parts in their order.
With SiLU·up a tile alternates between 8 outputs of gate and the same 8 of up, as in gated_gemm.py.

Shapes: T rows (tokens) | L weight rows of a tile | H bytes of a chunk of a row
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info

from nanovllm.kernels.triton.common import (
    arrival_counters,
    dot,
    finish,
    launch_options,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)
from nanovllm.kernels.triton.packed_codes import CODE, E2M1, FP8, TABLE, Codes
from nanovllm.kernels.triton.packed_tiles import PackedGemmTile, gemm_tile


@triton.jit
def _of_fp8(code, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Bytes as numbers in float8_e4m3fn, exactly, in bf16 or fp16; NaN becomes 480.

    The exponent and the mantissa move to their places, and a factor corrects the exponent.
    """
    if dtype == tl.bfloat16 and target_info.is_cuda() and not UPCAST:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 p, q, m, n, large, zero; mov.b32 large, 0x7b807b80;"
            " mov.b32 zero, 0x80008000; prmt.b32 p, $2, 0, 0x1404; prmt.b32 q, $2, 0, 0x3424;"
            " shr.u32 m, p, 4; shr.u32 n, q, 4; and.b32 p, p, 0x80008000; and.b32 q, q, 0x80008000;"
            " lop3.b32 m, m, 0x07f007f0, p, 0xea; lop3.b32 n, n, 0x07f007f0, q, 0xea;"
            " fma.rn.bf16x2 $0, m, large, zero;"
            " fma.rn.bf16x2 $1, n, large, zero; }",
            "=r,=r,r", [code], dtype=tl.bfloat16, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        bits = ((code.to(tl.int32) & 0x80) << 24) | ((code.to(tl.int32) & 0x7F) << 20)
        return (bits.to(tl.float32, bitcast=True) * 2.0**120).to(dtype)


@triton.jit
def _of_pairs(code, scale, offset, dtype: tl.constexpr, IS_PURE: tl.constexpr):
    """code · scale + offset of the lower and the upper codes of bytes, in bf16 or fp16.

    In bf16 the bits of a code are a denormal number, or one of the smallest normal numbers: the
    code times 2⁻¹³³, or 2⁻¹²⁹ for upper codes. Scales correct this, so that numbers come out times
    1 / `times`, and a pair takes two instructions. In fp16 1024 + code is the code in the mantissa
    of 1024. Sums are exact before they are rounded.
    """
    if dtype == tl.bfloat16:
        low = (scale.to(tl.float32) * 2.0**113).to(tl.bfloat16)
        high = (scale.to(tl.float32) * 2.0**109).to(tl.bfloat16)
        less = (offset.to(tl.float32) * 2.0**-20).to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 p, q; prmt.b32 p, $4, 0, 0x4140; prmt.b32 q, $4, 0, 0x4342;"
            " and.b32 $0, p, 0x000f000f; and.b32 $1, q, 0x000f000f;"
            " and.b32 $2, p, 0x00f000f0; and.b32 $3, q, 0x00f000f0;"
            " fma.rn.bf16x2 $0, $0, $5, $9; fma.rn.bf16x2 $1, $1, $6, $10;"
            " fma.rn.bf16x2 $2, $2, $7, $9; fma.rn.bf16x2 $3, $3, $8, $10; }",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r", [code, low, high, less],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=IS_PURE, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 p, q, one, less; mov.b32 one, 0x3c003c00; mov.b32 less, 0xe400e400;"
            " prmt.b32 p, $4, 0, 0x4140; prmt.b32 q, $4, 0, 0x4342;"
            " lop3.b32 $0, p, 0x000f000f, 0x64006400, 0xea;"
            " lop3.b32 $1, q, 0x000f000f, 0x64006400, 0xea;"
            " shr.u32 p, p, 4; shr.u32 q, q, 4;"
            " lop3.b32 $2, p, 0x000f000f, 0x64006400, 0xea;"
            " lop3.b32 $3, q, 0x000f000f, 0x64006400, 0xea;"
            " fma.rn.f16x2 $0, $0, one, less; fma.rn.f16x2 $1, $1, one, less;"
            " fma.rn.f16x2 $2, $2, one, less; fma.rn.f16x2 $3, $3, one, less;"
            " fma.rn.f16x2 $0, $0, $5, $7; fma.rn.f16x2 $1, $1, $6, $8;"
            " fma.rn.f16x2 $2, $2, $5, $7; fma.rn.f16x2 $3, $3, $6, $8; }",
            "=&r,=&r,=&r,=&r,r,r,r,r,r", [code, scale.to(dtype), offset.to(dtype)],
            dtype=(tl.float16, tl.float16), is_pure=IS_PURE, pack=4,
        )  # fmt: skip


@triton.jit
def _of_e2m1_pairs(code, scale, IS_PURE: tl.constexpr):
    """e2m1 · scale of the lower and the upper codes of bytes, in bf16, times 2⁻²⁰.

    The exponent and the mantissa move to the lowest bits of a number's exponent and the highest of
    its mantissa, where they are e2m1 times 2⁻¹²⁶, or a denormal number; scales correct this. In a
    half of p a byte is the upper one.
    """
    factor = (scale.to(tl.float32) * 2.0**106).to(tl.bfloat16)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 p, q, a, b, c, d, m, n, zero; mov.b32 zero, 0x80008000;"
        " prmt.b32 p, $4, 0, 0x1404; prmt.b32 q, $4, 0, 0x3424;"
        " shl.b32 a, p, 4; shl.b32 b, q, 4; and.b32 a, a, zero; and.b32 b, b, zero;"
        " shr.u32 m, p, 2; shr.u32 n, q, 2;"
        " lop3.b32 m, m, 0x01c001c0, a, 0xea; lop3.b32 n, n, 0x01c001c0, b, 0xea;"
        " fma.rn.bf16x2 $0, m, $5, zero; fma.rn.bf16x2 $1, n, $6, zero;"
        " and.b32 c, p, zero; and.b32 d, q, zero; shr.u32 m, p, 6; shr.u32 n, q, 6;"
        " lop3.b32 m, m, 0x01c001c0, c, 0xea; lop3.b32 n, n, 0x01c001c0, d, 0xea;"
        " fma.rn.bf16x2 $2, m, $5, zero; fma.rn.bf16x2 $3, n, $6, zero; }",
        "=&r,=&r,=&r,=&r,r,r,r", [code, factor],
        dtype=(tl.bfloat16, tl.bfloat16), is_pure=IS_PURE, pack=4,
    )  # fmt: skip


@triton.jit
def times(dtype: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr,
          UPCAST: tl.constexpr):  # fmt: skip
    """What the results of `numbers` are multiplied by to be the real values."""
    has_pairs: tl.constexpr = FORM == CODE or FORM == E2M1  # a kernel has no `in`
    is_fast = has_pairs and BITS == 4 and GROUP != 16 and target_info.is_cuda() and not UPCAST
    return 2.0**20 if is_fast and dtype == tl.bfloat16 else 1.0


@triton.jit
def _real(code, scale, offset, table_ptr, dtype: tl.constexpr, FORM: tl.constexpr):
    """level · scale + offset of codes, in `dtype`."""
    if FORM == TABLE:
        level = tl.load(table_ptr + code.to(tl.int32)).to(tl.float32)
    elif FORM == E2M1:
        bits = ((code.to(tl.int32) & 8) << 28) | ((code.to(tl.int32) & 7) << 22)
        level = bits.to(tl.float32, bitcast=True) * 2.0**126
    else:  # 2²³ + code is the code in the mantissa of 2²³
        level = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return (level * scale.to(tl.float32) + offset.to(tl.float32)).to(dtype)


@triton.jit
def _of_bytes(scale, code_LH):
    """A chunk's scales for its bytes: [L, 1] as it is, and [L, n] each for 16 bytes."""
    L: tl.constexpr = code_LH.shape[0]
    n: tl.constexpr = scale.shape[1]
    if n == 1:
        return scale
    else:
        return tl.reshape(tl.broadcast_to(scale[:, :, None], (L, n, 16)), code_LH.shape)


@triton.jit
def numbers(code_LH, scales, offsets, table_ptr, dtype: tl.constexpr, BITS: tl.constexpr,
            FORM: tl.constexpr, IS_PURE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """The real values of the codes of bytes in `dtype`: of the lower and of the upper codes, or of
    the only ones; multiply them by `times`. Numbers in fp8 are without their scales."""
    if FORM == FP8:
        return (_of_fp8(code_LH, dtype, UPCAST),)
    elif BITS == 8:
        return (_real(code_LH, scales[0], offsets[0], table_ptr, dtype, FORM),)
    elif FORM == CODE and len(scales) == 1 and target_info.is_cuda() and not UPCAST:
        return _of_pairs(code_LH, scales[0], offsets[0], dtype, IS_PURE)
    elif (FORM == E2M1 and dtype == tl.bfloat16 and len(scales) == 1 and target_info.is_cuda()
          and not UPCAST):  # fmt: skip
        return _of_e2m1_pairs(code_LH, _of_bytes(scales[0], code_LH), IS_PURE)
    else:
        low, high = _of_bytes(scales[0], code_LH), _of_bytes(scales[-1], code_LH)
        return (
            _real(code_LH & 15, low, offsets[0], table_ptr, dtype, FORM),
            _real(code_LH >> 4, high, offsets[-1], table_ptr, dtype, FORM),
        )


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


@triton.jit(do_not_specialize=["num_rows"])
def packed_gemm_kernel(
    x_ptr,  # [T, D]
    code_ptr,  # [O, C]
    scale_ptr,  # [R, G]
    offset_ptr,  # [R, G], read if HAS_OFFSET
    table_ptr,
    bias_ptr,  # [O], read if HAS_BIAS
    residual_ptr,  # [T, NUM_OUTS], read if HAS_RESIDUAL
    out_ptr,  # [T, NUM_OUTS], written
    part_ptr,  # [SPLITS, tiles, L, ROWS] fp32, written if SPLITS > 1
    arrived_ptr,  # [tiles] int32: zero before and after each launch
    x_stride,
    num_rows,
    NUM_OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU_MUL: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    HALF: tl.constexpr = COLUMNS * BITS // 8
    OUTS: tl.constexpr = LINES // 2 if SILU_MUL else LINES
    CHUNKS: tl.constexpr = DEPTH // COLUMNS
    STEPS: tl.constexpr = CHUNKS // (SPLITS * EACH)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, split = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.program_id(2)
    row_T = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real_T = row_T < num_rows
    line_L = lines_of(tl.program_id(0) * OUTS, NUM_OUTS, LINES, SILU_MUL)
    x_at = x_ptr + row_T.to(tl.int64)[:, None] * x_stride + columns_of(HALF, BITS)[None, :]
    acc_LT = tl.zeros((LINES, ROWS), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc_LT = packed_sums(
        acc_LT, code_ptr, scale_ptr, offset_ptr, table_ptr, x_at, tl.program_id(0) * OUTS, line_L,
        real_T, split * (STEPS * EACH), dtype, STEPS, DEPTH, BITS, FORM, GROUP, GROUP_ROWS,
        NUM_GROUPS, HAS_OFFSET, COLUMNS, EACH, STAGES, NUM_OUTS if SILU_MUL else 0, LINES,
        ALL_ROWS, UPCAST,
    )  # fmt: skip

    if SPLITS > 1:
        i_LT = tl.arange(0, LINES)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        num_tiles = tl.num_programs(0) * tl.num_programs(1)
        part_at = part_ptr + (tile * (LINES * ROWS) + i_LT)
        each = num_tiles * (LINES * ROWS)
        tl.store(part_at + split * each, acc_LT)
        # all threads store before the one thread's release; its acquire comes before all loads
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") != SPLITS - 1:
            return
        tl.store(arrived_ptr + tile, 0)
        acc_LT = tl.zeros((LINES, ROWS), tl.float32)
        for i in tl.static_range(SPLITS):
            # other multiprocessors wrote these, so .cg bypasses L1
            acc_LT += tl.load(part_at + i * each, cache_modifier=".cg")
    if HAS_BIAS:
        acc_LT += tl.load(bias_ptr + line_L).to(tl.float32)[:, None]
    y_TO = tl.trans(results_of(acc_LT, dtype, SILU_MUL))
    o_O = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    mask_TO = real_T[:, None] & (o_O < NUM_OUTS)[None, :]
    at_TO = row_T[:, None] * NUM_OUTS + o_O[None, :]
    if HAS_RESIDUAL:
        residual_TO = tl.load(residual_ptr + at_TO, mask=mask_TO, other=0.0)
        y_TO = (y_TO.to(tl.float32) + residual_TO.to(tl.float32)).to(dtype)
    tl.store(out_ptr + at_TO, y_TO, mask=mask_TO)


def gemm_constants(
    num_rows: int, num_outs: int, depth: int, codes: Codes, silu_mul: bool, tile: PackedGemmTile
) -> dict[str, Any]:
    """The kernel's constants that depend on the weight and the tile."""
    return codes.constants() | {
        "NUM_OUTS": num_outs,
        "DEPTH": depth,
        "ROWS": tile.rows,
        "ALL_ROWS": num_rows % tile.rows == 0,
        "LINES": tile.lines,
        "COLUMNS": tile.columns,
        "EACH": tile.each,
        "SPLITS": tile.splits,
        "STAGES": tile.num_stages,
        "SILU_MUL": silu_mul,
    }


def packed_gemm(
    x_TD: Tensor,
    codes: Codes,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    silu_mul: bool,
    launch: PackedGemmTile | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """x · weightᵀ + bias, then silu(gate) · up, then + residual; see `reference.packed`.

    bf16 or fp16, last strides 1. `launch` and `pdl` override the tile and programmatic dependent
    launch, for measurements.
    """
    (num_rows, depth), device = x_TD.shape, x_TD.device
    num_outs = codes.num_rows // 2 if silu_mul else codes.num_rows
    tile = launch or gemm_tile(num_rows, codes, depth, shared_memory_bytes(device))
    out_TO = torch.empty((num_rows, num_outs), dtype=x_TD.dtype, device=device)
    outs = tile.lines // 2 if silu_mul else tile.lines
    grid = (triton.cdiv(num_outs, outs), triton.cdiv(num_rows, tile.rows), tile.splits)
    part, arrived = out_TO, out_TO
    if tile.splits > 1:
        size = tile.splits * grid[0] * grid[1] * tile.lines * tile.rows
        part = torch.empty(size, dtype=torch.float32, device=device)
        arrived = arrival_counters(device, grid[0] * grid[1])
    packed_gemm_kernel[grid](
        x_TD,
        codes.code,
        *codes.tensors(),
        x_TD if bias_O is None else bias_O,
        x_TD if residual_TO is None else residual_TO,
        out_TO,
        part,
        arrived,
        x_TD.stride(0),
        num_rows,
        **gemm_constants(num_rows, num_outs, depth, codes, silu_mul, tile),
        HAS_BIAS=bias_O is not None,
        HAS_RESIDUAL=residual_TO is not None,
        UPCAST=device.type != "cuda",
        num_warps=tile.num_warps,
        **(launch_options(device) if pdl is not False else {"PDL": False}),
    )
    return out_TO


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
