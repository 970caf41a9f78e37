"""Codes of packed weights, and weights in fp8, as numbers in registers: device functions in Triton.

The codes are those of `reference.packed`. A word has 4 bytes: the codes of 8 columns, or of 4.

Shapes: any; L weight rows | H bytes of a chunk
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.reference.packed import is_e2m1

# What a code stands for: itself, an entry of a table, a number in float8_e4m3fn, or one in e2m1.
CODE, TABLE, FP8, E2M1 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
BLOCK = 32  # columns in a block of codes of 4 bits


class Codes(NamedTuple):
    """A weight in codes as the kernels take it, or the weights of all experts.

    code: bytes [.., O, C]. scale, offset: [.., R, G]; a scale is for `group_rows` rows and `group`
    columns. table: the levels of codes.
    """

    code: Tensor
    scale: Tensor
    offset: Tensor | None
    table: Tensor | None
    bits: int
    group_rows: int
    group: int
    is_fp8: bool = False

    @property
    def num_rows(self) -> int:
        return self.code.shape[-2]

    @property
    def form(self) -> int:
        found = FP8 if self.is_fp8 else CODE if self.table is None else TABLE
        return int((E2M1 if is_e2m1(self.table) and self.offset is None else found).value)

    @property
    def reads_table(self) -> bool:
        return self.form == TABLE.value

    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        return {
            "BITS": self.bits,
            "FORM": self.form,
            "GROUP": self.group,
            "GROUP_ROWS": self.group_rows,
            "NUM_GROUPS": self.scale.shape[-1],
            "HAS_OFFSET": self.offset is not None,
        }

    def tensors(self) -> tuple[Tensor, ...]:
        """(scale, offset, table), each one replaced if it is not read."""
        offset = self.scale if self.offset is None else self.offset
        table = self.table if self.table is not None and self.reads_table else self.scale
        return self.scale, offset, table


def of_packed(
    code: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None, bits: int, group: int
) -> Codes:
    """A weight of `reference.packed.packed_linear`."""
    return Codes(code, scale, offset, table, bits, 1, group)


def of_fp8(weight: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Codes:
    """A weight of `reference.packed.fp8_linear`."""
    bits = 8 if weight.dtype is torch.float8_e4m3fn else 0  # 0: `takes` refuses it
    return Codes(weight.view(torch.uint8), scale, None, None, bits, block_rows, block_columns, True)


def takes(codes: Codes, depth: int) -> bool:
    """True if the kernels can read the weight.

    Rows are whole blocks of 16 bytes, and groups are whole blocks. Groups of 16 are half of one.
    """
    floats = (torch.float32, torch.float16, torch.bfloat16)
    tensors = [codes.code, codes.scale] + [one for one in codes[2:4] if one is not None]
    columns = BLOCK if codes.bits == 4 else BLOCK // 2
    return (
        codes.bits in (4, 8)
        and codes.code.dtype is torch.uint8
        and all(one.is_contiguous() for one in tensors)
        and all(one.dtype in floats for one in tensors[1:])
        and codes.code.storage_offset() % 16 == 0
        and depth % columns == 0
        and codes.code.shape[-1] * 8 == depth * codes.bits
        and (codes.group >= depth or codes.group % 16 == 0)
        and (codes.group >= depth or codes.group % columns == 0 or codes.group == 16)
    )


@triton.jit
def scaled_level(word, K: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, table_ptr):
    """The level of the code K of words of 32 bits, in fp32, times `level_factor`.

    Codes of 4 bits are counted by bytes, the lower half first. The bits of a code, where they are
    in the word, are a denormal number or one of the smallest normal numbers: the code times a power
    of two. So a code takes one instruction. Multiplications take such numbers at full speed.
    """
    if FORM == TABLE:
        code = (word >> (BITS * K)) & ((1 << BITS) - 1)
        return tl.load(table_ptr + code.to(tl.int32)).to(tl.float32)
    elif FORM == FP8:
        signed = (word << (24 - 8 * K)).to(tl.int32, bitcast=True)
        # the arithmetic shift keeps the sign and moves the exponent behind it
        return ((signed >> 4) & -0x78100000).to(tl.float32, bitcast=True)
    elif FORM == E2M1:
        signed = (word << (28 - 4 * K)).to(tl.int32, bitcast=True)
        return ((signed >> 6) & -0x7E400000).to(tl.float32, bitcast=True)
    elif BITS == 8:
        if K == 3:
            return (word >> 24).to(tl.float32, bitcast=True)
        else:
            return (word & (255 << (8 * K))).to(tl.float32, bitcast=True)
    elif K < 6:
        return (word & (15 << (4 * K))).to(tl.float32, bitcast=True)
    else:
        return ((word >> 8) & (15 << (4 * K - 8))).to(tl.float32, bitcast=True)


@triton.jit
def x_factor(K: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr):
    """What x is multiplied by for the code K, so that all products have the factor 1 / `UNIT`."""
    if FORM == TABLE:
        return 1.0
    elif FORM == FP8:
        return 2.0**60
    elif FORM == E2M1:
        return 2.0**63
    elif BITS == 8:
        return 2.0**80 if K == 3 else 2.0 ** (80 - 8 * K)
    else:
        return 2.0 ** (80 - 4 * K) if K < 6 else 2.0 ** (88 - 4 * K)


@triton.jit
def unit(FORM: tl.constexpr):
    """The sum of products times this is the sum of x · level."""
    if FORM == TABLE:
        return 1.0
    elif FORM == FP8:
        return 2.0**60
    elif FORM == E2M1:
        return 2.0**63
    else:
        return 2.0**69
