"""Selects the kernel of each product with packed weights on a GPU.

bf16 goes to kernels/cuda on NVIDIA GPUs of sm_80 on: there up to 64 rows and on sm_90 up to 256;
other dtypes, GPUs and forms of codes to Triton, and more rows to cuBLAS: in fp8, or with the real
values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import dequantized, reference
from nanovllm.kernels.cuda import packed_linear as cuda_packed
from nanovllm.kernels.cuda import packed_stream, packed_wgmma
from nanovllm.kernels.triton import fp8_products, packed_codes, packed_tiles
from nanovllm.kernels.triton.norm_act import rms_norm, silu_mul
from nanovllm.kernels.triton.packed_codes import Codes
from nanovllm.kernels.triton.packed_dequantize import dequantize
from nanovllm.kernels.triton.packed_experts import DTYPES, has_units
from nanovllm.kernels.triton.packed_gemm import packed_gemm
from nanovllm.kernels.triton.packed_gemv import packed_gemv

# cuBLAS gets the real values of so many rows of a weight at a time, which bounds their memory.
DEQUANTIZED_BYTES = 128 << 20
# More rows than this in fp8 are multiplied by the units of fp8, where there are some.
MAX_FP8_ROWS = 32
# Without matrix units so many rows are multiplied one by one.
MAX_ROWS_ONE_BY_ONE = 4


def takes(x_TD: Tensor, codes: Codes, norm: bool) -> bool:
    """True if one launch computes the product with its neighbours. Several rows are normed by
    products in CUDA C++ alone."""
    num_rows = len(x_TD)
    if norm:
        return num_rows == 1 or (cuda_packed.takes_norm(x_TD) and cuda_packed.takes(x_TD, codes))
    return num_rows == 1 or (has_units(x_TD.device) and num_rows <= packed_tiles.MAX_ROWS)


def takes_packed(
    x_TD: Tensor,
    code_OC: Tensor,
    scale_OG: Tensor,
    offset_OG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    has_norm: bool,
    silu: bool,
) -> bool:
    """For the pass `fuse_linear`: whether `fused_packed_linear` is one launch."""
    codes = packed_codes.of_packed(code_OC, scale_OG, offset_OG, table, bits, group)
    if not _can(x_TD, codes):
        return False
    if packed_stream.takes(x_TD, codes):
        return True
    if _wgmma_tile(x_TD, codes) is not None:
        return not has_norm
    return takes(x_TD, codes, has_norm)


def takes_fp8(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_RG: Tensor,
    block_rows: int,
    block_columns: int,
    has_norm: bool,
    silu: bool,
) -> bool:
    """For the pass `fuse_linear`: whether `fused_fp8_linear` is one launch."""
    codes = packed_codes.of_fp8(weight_OD, scale_RG, block_rows, block_columns)
    if not _can(x_TD, codes) or _is_by_fp8(x_TD, codes):
        return False
    return takes(x_TD, codes, has_norm) or packed_stream.takes(x_TD, codes)


def _can(x_TD: Tensor, codes: Codes) -> bool:
    return (
        x_TD.dim() == 2
        and x_TD.dtype in DTYPES
        and x_TD.shape[0] > 0
        and packed_codes.takes(codes, x_TD.shape[1])
    )


def _product(
    x_TD: Tensor,
    norm_D: Tensor | None,
    codes: Codes,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu: bool,
) -> Tensor | None:
    """The product with its neighbours, or None if the kernels cannot take it."""
    if not _can(x_TD, codes) or any(
        one is not None and one.dtype is not x_TD.dtype for one in (norm_D, residual_TO)
    ):
        return None
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    residual_TO = None if residual_TO is None else residual_TO.contiguous()
    num_rows, matrix_units = x_TD.shape[0], has_units(x_TD.device)
    if packed_stream.takes(x_TD, codes):
        return packed_stream.packed_stream(
            x_TD, codes, norm_D=norm_D, eps=eps, bias_O=bias_O, residual_TO=residual_TO,
            silu_mul=silu,
        )  # fmt: skip
    tile = _wgmma_tile(x_TD, codes)
    if norm_D is not None and (tile is not None or not takes(x_TD, codes, True)):
        x_TD, norm_D = rms_norm(x_TD, norm_D, eps), None
    if tile is not None:
        return packed_wgmma.packed_wgmma(x_TD, codes, tile, bias_O, residual_TO, silu)
    if num_rows <= packed_tiles.MAX_ROWS and not _is_by_fp8(x_TD, codes):
        if cuda_packed.takes(x_TD, codes):
            return cuda_packed.packed_linear(
                x_TD, codes, norm_D=norm_D, eps=eps, bias_O=bias_O, residual_TO=residual_TO,
                silu_mul=silu,
            )  # fmt: skip
        if num_rows == 1 or (num_rows <= MAX_ROWS_ONE_BY_ONE and not matrix_units):
            return packed_gemv(
                x_TD, codes, norm_D=norm_D, eps=eps, bias_O=bias_O, residual_TO=residual_TO,
                silu_mul=silu,
            )  # fmt: skip
        if matrix_units:
            return packed_gemm(x_TD, codes, bias_O, residual_TO, silu)
    if _is_by_fp8(x_TD, codes):
        y_TO = fp8_products.fp8_product(x_TD, codes)
        y_TO = y_TO if bias_O is None else y_TO.add_(bias_O)
    else:
        y_TO = _by_cublas(x_TD, codes, bias_O)
    y_TO = silu_mul(y_TO) if silu else y_TO
    return y_TO if residual_TO is None else y_TO.add_(residual_TO)


def _wgmma_tile(x_TD: Tensor, codes: Codes) -> packed_wgmma.Tile | None:
    """The sizes of a program of packed_wgmma.cu, if it takes the product and is the fastest."""
    if not packed_wgmma.takes(x_TD, codes):
        return None
    return packed_wgmma.tile_of(x_TD.shape[0], codes, x_TD.shape[1])


def _is_by_fp8(x_TD: Tensor, codes: Codes) -> bool:
    return (
        x_TD.shape[0] > MAX_FP8_ROWS
        and fp8_products.has_units(x_TD.device)
        and fp8_products.takes(x_TD, codes)
    )


def _by_cublas(x_TD: Tensor, codes: Codes, bias_O: Tensor | None) -> Tensor:
    """x · weightᵀ + bias with the real values of some rows of the weight after the other."""
    depth, num_lines = x_TD.shape[1], codes.num_rows
    some = max(128, DEQUANTIZED_BYTES // (depth * x_TD.element_size()) // 128 * 128)
    some = max(1, some // codes.group_rows) * codes.group_rows
    if num_lines <= some:
        return torch.nn.functional.linear(x_TD, dequantize(codes, depth, x_TD.dtype), bias_O)
    out_TO = x_TD.new_empty((x_TD.shape[0], num_lines))
    for first in range(0, num_lines, some):
        rows = slice(first, first + some)
        groups = slice(first // codes.group_rows, (first + some) // codes.group_rows)
        part = codes._replace(
            code=codes.code[rows],
            scale=codes.scale[groups],
            offset=None if codes.offset is None else codes.offset[groups],
        )
        bias = None if bias_O is None else bias_O[rows]
        real_OD = dequantize(part, depth, x_TD.dtype)
        out_TO[:, rows] = torch.nn.functional.linear(x_TD, real_OD, bias)
    return out_TO


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
    """See `reference.packed.packed_linear`."""
    codes = packed_codes.of_packed(code_OC, scale_OG, offset_OG, table, bits, group)
    found = _product(x_TD, None, codes, bias_O, residual_TO, 0.0, False)
    if found is not None:
        return found
    return dequantized.packed_linear(x_TD, *codes[:4], bits, group, bias_O, residual_TO)


def fp8_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_RG: Tensor,
    block_rows: int,
    block_columns: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """See `reference.packed.fp8_linear`."""
    codes = packed_codes.of_fp8(weight_OD, scale_RG, block_rows, block_columns)
    found = _product(x_TD, None, codes, bias_O, residual_TO, 0.0, False)
    if found is not None:
        return found
    return dequantized.fp8_linear(
        x_TD, weight_OD, scale_RG, block_rows, block_columns, bias_O, residual_TO
    )


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
    """`reference.packed.fused_packed_linear`. The weights may be read before earlier kernels end,
    so no running kernel may write them."""
    codes = packed_codes.of_packed(code_OC, scale_OG, offset_OG, table, bits, group)
    found = _product(x_TD, norm_weight_D, codes, bias_O, residual_TO, eps, silu_mul)
    if found is not None:
        return found
    return reference.packed.fused_packed_linear(
        x_TD, norm_weight_D, *codes[:4], bits, group, bias_O, residual_TO, eps, silu_mul
    )


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
    """`reference.packed.fused_fp8_linear`; as above."""
    codes = packed_codes.of_fp8(weight_OD, scale_RG, block_rows, block_columns)
    found = _product(x_TD, norm_weight_D, codes, bias_O, residual_TO, eps, silu_mul)
    if found is not None:
        return found
    return reference.packed.fused_fp8_linear(
        x_TD, norm_weight_D, weight_OD, scale_RG, block_rows, block_columns, bias_O, residual_TO,
        eps, silu_mul,
    )  # fmt: skip
