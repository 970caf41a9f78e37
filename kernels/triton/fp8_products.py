"""Products in fp8 on the matrix units of fp8, for many rows: x is rounded to fp8, in groups of 128
columns or by rows, and cuBLAS multiplies.

The configs of checkpoints in fp8 ask for such inputs (`activation_scheme`).

Shapes: T rows | D depth | O weight rows | G groups of 128 columns
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels.triton.common import FP8_MAX, launch_options, to_fp8, wait_for_earlier_kernels
from nanovllm.kernels.triton.packed_codes import Codes

GROUP = 128
ROWS = 16  # cuBLAS wants a multiple of so many rows
SCALES = 4  # and of scales of a weight row
MIN_SCALE = tl.constexpr(1e-12)


@functools.cache
def has_units(device: torch.device) -> bool:
    """True if cuBLAS multiplies numbers in fp8 with scales of blocks on this GPU: sm_90."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device)[0] == 9


def takes(x_TD: Tensor, codes: Codes) -> bool:
    """True if `fp8_product` can multiply rows like these with the weight."""
    num_lines, depth = codes.num_rows, x_TD.shape[-1]
    has_blocks = codes.group_rows == GROUP and codes.group == GROUP
    has_rows = codes.group_rows == 1 and codes.group >= depth
    return (
        codes.is_fp8
        and x_TD.dtype is torch.bfloat16
        and codes.scale.dtype is torch.float32
        and (has_rows or (has_blocks and depth % GROUP == 0))
        and depth % 16 == 0
        and num_lines % 16 == 0
    )


@triton.jit
def quantize_kernel(
    x_ptr,  # [T, D]
    q_ptr,  # [T, D] fp8, written
    scale_ptr,  # [G, scale_stride] fp32, written
    x_stride,
    scale_stride,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """GROUPS groups of one row; COLUMNS is GROUP or the power of 2 above."""
    wait_for_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    group_G = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column_C = tl.arange(0, COLUMNS)
    at_GC = group_G[:, None] * GROUP + column_C[None, :]
    mask_GC = (at_GC < DEPTH) & (column_C < GROUP)[None, :]
    x_GC = tl.load(x_ptr + row * x_stride + at_GC, mask=mask_GC, other=0.0).to(tl.float32)
    scale_G = tl.maximum(tl.max(tl.abs(x_GC), 1) / FP8_MAX, MIN_SCALE)
    tl.store(q_ptr + row * DEPTH + at_GC, to_fp8(x_GC, scale_G[:, None]), mask=mask_GC)
    tl.store(scale_ptr + group_G * scale_stride + row, scale_G, mask=group_G * GROUP < DEPTH)


def quantize(x_TD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(x in fp8 [T', D], its scales [G, T']): the largest magnitude of a group becomes 448.

    T' is T rounded up for cuBLAS; what is in the rows behind T is not defined.
    """
    num_rows, depth = x_TD.shape
    num_groups, most = triton.cdiv(depth, group), triton.cdiv(num_rows, ROWS) * ROWS
    q_TD = torch.empty((most, depth), dtype=torch.float8_e4m3fn, device=x_TD.device)
    scale_GT = torch.empty((num_groups, most), dtype=torch.float32, device=x_TD.device)
    columns = triton.next_power_of_2(group)
    groups = max(1, min(triton.next_power_of_2(num_groups), 4096 // columns))
    quantize_kernel[(num_rows, triton.cdiv(num_groups, groups))](
        x_TD,
        q_TD,
        scale_GT,
        x_TD.stride(0),
        most,
        DEPTH=depth,
        GROUP=group,
        GROUPS=groups,
        COLUMNS=columns,
        num_warps=4 if columns <= 4096 else 8,
        **launch_options(x_TD.device),
    )
    return q_TD, scale_GT


def fp8_product(x_TD: Tensor, codes: Codes) -> Tensor:
    """x · weightᵀ [T, O], with x rounded to fp8; `takes` is true."""
    is_by_block = codes.group_rows == GROUP
    q_TD, scale_GT = quantize(x_TD, GROUP if is_by_block else x_TD.shape[1])
    scale_RG, num_rows = codes.scale, x_TD.shape[0]
    if is_by_block and scale_RG.shape[1] % SCALES:
        scale_RG = F.pad(scale_RG, (0, -scale_RG.shape[1] % SCALES))
    weight_DO = codes.code.view(torch.float8_e4m3fn).t()
    kinds: Any = F.ScalingType  # type: ignore[attr-defined]
    how = (kinds.BlockWise1x128, kinds.BlockWise128x128) if is_by_block else (kinds.RowWise,) * 2
    y_TO: Tensor = F.scaled_mm(  # type: ignore[attr-defined]
        q_TD, weight_DO, scale_GT.t(), how[0], scale_RG.t(), how[1], output_dtype=x_TD.dtype
    )
    return y_TO[:num_rows]
