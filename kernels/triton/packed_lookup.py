"""Rows of a table in packed codes in Triton, one launch. A program makes some columns of a row.

Without it a step that begins with such a table needs Inductor, whose import and compile take
seconds at each start.

Shapes: T rows that are read | D columns | K columns of one program
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.packed_codes import BLOCK

COLUMNS = 1024  # of one program, at most


@triton.jit
def packed_lookup_kernel(
    row_ptr,  # [T]
    code_ptr,  # [V, C]
    scale_ptr,  # [V, G]
    offset_ptr,  # [V, G], read if HAS_OFFSET
    table_ptr,  # [2 ** BITS], read if HAS_TABLE
    out_ptr,  # [T, D], written
    NUM_BYTES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + number).to(tl.int64)
    d_K = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column_K = d_K < DEPTH
    if BITS == 8:
        code_at = code_ptr + row * NUM_BYTES + d_K
        code_K = tl.load(code_at, mask=is_column_K, other=0).to(tl.int32)
    else:  # the upper halves of a block's bytes are its later columns
        byte_K = d_K // (2 * HALF_BLOCK) * HALF_BLOCK + d_K % HALF_BLOCK
        code_at = code_ptr + row * NUM_BYTES + byte_K
        shift_K = d_K // HALF_BLOCK % 2 * 4
        code_K = (tl.load(code_at, mask=is_column_K, other=0).to(tl.int32) >> shift_K) & 15
    level_K = (tl.load(table_ptr + code_K) if HAS_TABLE else code_K).to(tl.float32)
    group_K = row * NUM_GROUPS + d_K // GROUP
    value_K = level_K * tl.load(scale_ptr + group_K, mask=is_column_K, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        value_K += tl.load(offset_ptr + group_K, mask=is_column_K, other=0.0).to(tl.float32)
    out_at = out_ptr + number * DEPTH + d_K
    tl.store(out_at, value_K.to(out_ptr.dtype.element_ty), mask=is_column_K)


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
    """`reference.packed.packed_lookup`."""
    out = torch.empty((*row_T.shape, depth), dtype=dtype, device=code_VC.device)
    if out.numel() == 0:
        return out
    code_VC, scale_VG = code_VC.contiguous(), scale_VG.contiguous()
    columns = min(COLUMNS, triton.next_power_of_2(depth))
    packed_lookup_kernel[(row_T.numel(), triton.cdiv(depth, columns))](
        row_T.contiguous(),
        code_VC,
        scale_VG,
        scale_VG if offset_VG is None else offset_VG.contiguous(),
        scale_VG if table is None else table,
        out,
        NUM_BYTES=code_VC.shape[-1],
        NUM_GROUPS=scale_VG.shape[-1],
        DEPTH=depth,
        BITS=bits,
        GROUP=group,
        HALF_BLOCK=BLOCK // 2,
        HAS_OFFSET=offset_VG is not None,
        HAS_TABLE=table is not None,
        COLUMNS=columns,
        num_warps=4,
        **launch_options(code_VC.device),
    )
    return out
