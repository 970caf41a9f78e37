"""Products of weights in packed codes or in fp8. Shapes: see the package.

C bytes of codes in a row | G groups of columns, with a scale each | R blocks of rows

A weight in codes of 4 or 8 bits is `level · scale + offset`: the level of code c is c, or table[c];
scale and offset are those of the column's group, and there may be no offset. A byte holds one code
of 8 bits. Codes of 4 bits are in blocks of 32 columns, 16 bytes each: byte j has the code of column
j in its lower half and that of column j + 16 in its upper half, as GGUF has them. The last block of
a row may have columns behind the weight's depth, which no product reads.
Rows may be interleaved, 16 at a time: there are in turn 4 bytes of each, and scales and offsets of
a group lie side by side. Codes are [.., O / 16, C / 4, 16, 4] then, scales [.., O / 16, G, 16].
A table in fp16 is that of e2m1 (`e2m1_table`), whose levels kernels compute; others are in fp32.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from nanovllm.kernels.reference import norm_act
from nanovllm.kernels.reference.experts import expert_linear, experts
from nanovllm.kernels.reference.linear import linear

# codes, scales, offsets and table, bits, and columns in a group
Codes: TypeAlias = "tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int]"

BLOCK = 32  # columns in a block of codes of 4 bits
INTERLEAVED = 16  # rows
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*E2M1_MAGNITUDES, *(-one for one in E2M1_MAGNITUDES))


def e2m1_table(device: torch.device | str) -> Tensor:
    """The levels of e2m1, [16]: 4-bit floating point with two bits of exponent."""
    return torch.tensor(E2M1, dtype=torch.float16, device=device)


def is_e2m1(table: Tensor | None) -> bool:
    """True if the levels are those of e2m1: see the module."""
    return table is not None and table.dtype is torch.float16


def unpack(code: Tensor, bits: int) -> Tensor:
    """The codes of bytes along the last axis, in the order of columns."""
    if bits == 8:
        return code
    block = code.unflatten(-1, (-1, BLOCK // 2))
    return torch.cat((block & 15, block >> 4), -1).flatten(-2)


def pack(code: Tensor, bits: int) -> Tensor:
    """Bytes of codes along the last axis; columns are added up to a whole block of 4 bits."""
    if bits == 8:
        return code.to(torch.uint8).contiguous()
    padded = torch.nn.functional.pad(code.to(torch.uint8), (0, -code.shape[-1] % BLOCK))
    low, high = padded.unflatten(-1, (-1, BLOCK)).chunk(2, -1)
    return (low | (high << 4)).flatten(-2).contiguous()


def interleave(code_OC: Tensor, scale_OG: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales (or offsets) of rows, interleaved: O is a multiple of 16 and C of 4."""
    quads = interleave_groups(code_OC.contiguous().view(torch.int32))  # quicker than single bytes
    return quads.view(torch.uint8).unflatten(-1, (INTERLEAVED, 4)), interleave_groups(scale_OG)


def interleave_groups(scale_OG: Tensor) -> Tensor:
    return scale_OG.unflatten(-2, (-1, INTERLEAVED)).transpose(-2, -1).contiguous()


def is_interleaved(code: Tensor) -> bool:
    return code.dim() >= 4


def num_rows(code: Tensor) -> int:
    """The rows of a matrix, or of each expert's."""
    return code.shape[-4] * INTERLEAVED if is_interleaved(code) else code.shape[-2]


def in_rows(
    code: Tensor, scale: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and offsets by rows, whether these are interleaved or not."""
    if not is_interleaved(code):
        return code, scale, offset

    def of_groups(scale: Tensor) -> Tensor:
        return scale.transpose(-2, -1).flatten(-3, -2)

    code_OC = code.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return code_OC, of_groups(scale), None if offset is None else of_groups(offset)


def unpacked(
    code: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    depth: int,
) -> Tensor:
    """The real values [.., O, D] in fp32: codes [.., O, C], scales and offsets [.., O, G]."""
    code, scale, offset = in_rows(code, scale, offset)
    level = unpack(code, bits)[..., :depth]
    value = level.float() if table is None else table.float()[level.long()]
    value = value * _of_columns(scale, group, depth)
    return value if offset is None else value + _of_columns(offset, group, depth)


def packed_lookup(
    row_T: Tensor,
    code_VC: Tensor,
    scale_VG: Tensor,
    offset_VG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    depth: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows [T, D] of a table [V, D] in packed codes."""
    code_VC, scale_VG, offset_VG = in_rows(code_VC, scale_VG, offset_VG)
    offset_TG = None if offset_VG is None else offset_VG[row_T]
    some = code_VC[row_T], scale_VG[row_T], offset_TG
    return unpacked(*some, table, bits, group, depth).to(dtype)


def packed_linear(
    x_TD: Tensor,
    code_OC: Tensor,
    scale_OG: Tensor,
    offset_OG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """x · weightᵀ + bias, then + residual; the sum is in fp32 and is rounded to x's dtype once."""
    weight_OD = unpacked(code_OC, scale_OG, offset_OG, table, bits, group, x_TD.shape[-1])
    return _product(x_TD, weight_OD, bias_O, residual_TO)


def packed_expert_linear(
    x: Tensor,
    expert_TK: Tensor,
    code_EOC: Tensor,
    scale_EOG: Tensor,
    offset_EOG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """`experts.expert_linear` with weights in codes: [T, K, O]."""
    weight_EOD = unpacked(code_EOC, scale_EOG, offset_EOG, table, bits, group, x.shape[-1])
    return expert_linear(x, expert_TK, weight_EOD)


def of_fp8(weight: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """The real values [.., O, D] in fp32: fp8 numbers times the scale [.., R, G] of their block."""
    scale_OG = scale.repeat_interleave(block_rows, -2)[..., : weight.shape[-2], :]
    return weight.float() * _of_columns(scale_OG, block_columns, weight.shape[-1])


def fp8_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_RG: Tensor,
    block_rows: int,
    block_columns: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """x · weightᵀ + bias, then + residual; the sum is in fp32 and is rounded to x's dtype once."""
    weight = of_fp8(weight_OD, scale_RG, block_rows, block_columns)
    return _product(x_TD, weight, bias_O, residual_TO)


def fp8_expert_linear(
    x: Tensor,
    expert_TK: Tensor,
    weight_EOD: Tensor,
    scale_ERG: Tensor,
    block_rows: int,
    block_columns: int,
) -> Tensor:
    """`experts.expert_linear` with weights in fp8: [T, K, O]."""
    weight = of_fp8(weight_EOD, scale_ERG, block_rows, block_columns)
    return expert_linear(x, expert_TK, weight)


def fused_packed_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    code_OC: Tensor,
    scale_OG: Tensor,
    offset_OG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu_mul: bool,
) -> Tensor:
    """`packed_linear` with the ops around it, as in `linear.fused_linear`."""
    weight_OD = unpacked(code_OC, scale_OG, offset_OG, table, bits, group, x_TD.shape[-1])
    return _fused(x_TD, norm_weight_D, weight_OD, bias_O, residual_TO, eps, silu_mul)


def fused_fp8_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    weight_OD: Tensor,
    scale_RG: Tensor,
    block_rows: int,
    block_columns: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu_mul: bool,
) -> Tensor:
    """`fp8_linear` with the ops around it, as in `linear.fused_linear`."""
    weight = of_fp8(weight_OD, scale_RG, block_rows, block_columns)
    return _fused(x_TD, norm_weight_D, weight, bias_O, residual_TO, eps, silu_mul)


def packed_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    code_EOC: Tensor,
    scale_EOG: Tensor,
    offset_EOG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    down_code_EDC: Tensor,
    down_scale_EDG: Tensor,
    down_offset_EDG: Tensor | None,
    down_table: Tensor | None,
    down_bits: int,
    down_group: int,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`experts.experts` with weights in codes, in the order of inputs: gate and up, then down."""
    depth, size = x_TD.shape[-1], code_EOC.shape[1] // 2
    gate_up = unpacked(code_EOC, scale_EOG, offset_EOG, table, bits, group, depth)
    down_parts = (down_code_EDC, down_scale_EDG, down_offset_EDG, down_table, down_bits, down_group)
    down = unpacked(*down_parts, size)
    return experts(x_TD, weight_TK, expert_TK, gate_up, down, residual_TD, local_X)


def fp8_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    scale_ERG: Tensor,
    block_rows: int,
    block_columns: int,
    down_EDF: Tensor,
    down_scale_ERG: Tensor,
    down_block_rows: int,
    down_block_columns: int,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`experts.experts` with weights in fp8: gate and up, then down."""
    gate_up = of_fp8(gate_up_EGD, scale_ERG, block_rows, block_columns)
    down = of_fp8(down_EDF, down_scale_ERG, down_block_rows, down_block_columns)
    return experts(x_TD, weight_TK, expert_TK, gate_up, down, residual_TD, local_X)


def _fused(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu_mul: bool,
) -> Tensor:
    if norm_weight_D is not None:
        x_TD = norm_act.rms_norm(x_TD, norm_weight_D, eps)
    y_TO = _product(x_TD, weight_OD, bias_O, None)
    y_TO = norm_act.silu_mul(y_TO) if silu_mul else y_TO
    return y_TO if residual_TO is None else y_TO + residual_TO


def _product(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None
) -> Tensor:
    bias = None if bias_O is None else bias_O.float()
    y_TO = linear(x_TD.float(), weight_OD, bias).to(x_TD.dtype)
    return y_TO if residual_TO is None else y_TO + residual_TO


def _of_columns(of_groups: Tensor, group: int, depth: int) -> Tensor:
    return of_groups.float().repeat_interleave(group, -1)[..., :depth]
