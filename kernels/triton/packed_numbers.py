"""Codes of bytes as numbers in bf16 or fp16, for the matrix units: device functions in Triton.

A byte has codes of columns j and j + 16, so it gives two numbers. Numbers in fp8 are exact; the
others have scale and offset, and are rounded.

Shapes: L weight rows of a tile | H bytes of a chunk of a row
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info

from nanovllm.kernels.triton.packed_codes import CODE, E2M1, FP8, TABLE


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
