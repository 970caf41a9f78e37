"""Experts with packed weights: pair by pair for few tokens, else sorted into groups.

Each product is by the kernel that is the fastest: `cuda/packed_stream.py`, `cuda/packed_linear.py`
and `packed_gemv.py` for pairs one by one, `cuda/packed_groups.py`, `cuda/wgmma_groups.py` and
`packed_grouped.py` for sorted ones.

Shapes: T tokens | K experts per token | P = T·K pairs | E experts | X experts, with those elsewhere
| D hidden | F expert width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import dequantized, ops, reference
from nanovllm.kernels.cuda import packed_linear as cuda_packed
from nanovllm.kernels.cuda import packed_stream, wgmma_groups
from nanovllm.kernels.cuda.packed_groups import MOST_PAIRS, packed_groups
from nanovllm.kernels.triton import packed_codes
from nanovllm.kernels.triton.common import NO_CLAMP, Clamp, has_matrix_units
from nanovllm.kernels.triton.grouped_gemm import BY_PAIR, BY_PLACE, BY_TOKEN
from nanovllm.kernels.triton.moe_sort import Groups, combine, gather, sort_pairs
from nanovllm.kernels.triton.packed_codes import Codes
from nanovllm.kernels.triton.packed_gemv import packed_gemv
from nanovllm.kernels.triton.packed_grouped import packed_grouped
from nanovllm.kernels.triton.packed_tiles import few_pairs

DTYPES = (torch.float16, torch.bfloat16)


def grouped_product(
    x_PD: Tensor,
    codes: Codes,
    groups: Groups,
    top_k: int,
    *,
    x_by: int = BY_TOKEN.value,
    by_place: bool = False,
    silu_mul: bool = False,
    factor_TK: Tensor | None = None,
    bias_EO: Tensor | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> Tensor:
    """`packed_grouped` by the kernel that is the fastest for so many pairs of an expert. The result
    is in the order of sorted pairs, if `by_place`, else in that of pairs."""
    known: dict[str, Any] = {"silu_mul": silu_mul, "factor_TK": factor_TK, "bias_EO": bias_EO}
    if limit >= 0 and cuda_packed.takes(x_PD, codes):
        known |= {"by_place": by_place, "clamp": (alpha, limit) if limit else None}
        shared_by = {BY_TOKEN.value: top_k, BY_PAIR.value: 1, BY_PLACE.value: None}[x_by]
        if groups.pairs_each <= MOST_PAIRS:
            return packed_groups(x_PD, codes, groups, x_shared_by=shared_by, **known)
        if wgmma_groups.takes(x_PD, codes):
            x_PD = x_PD if shared_by is None else gather(x_PD, groups, shared_by)
            return wgmma_groups.wgmma_groups(x_PD, codes, groups, **known)
    out_by = BY_PLACE.value if by_place else BY_PAIR.value
    return packed_grouped(
        x_PD, codes, groups, top_k, factor_TK, x_by=x_by, out_by=out_by, silu_mul=silu_mul,
        bias_EO=bias_EO, alpha=alpha, limit=limit,
    )  # fmt: skip


def _expert_linear(x: Tensor, expert_TK: Tensor, codes: Codes) -> Tensor | None:
    """[T, K, O], or None if the kernels cannot take these."""
    x_PD = x.flatten(0, -2)
    if not takes(x_PD, codes) or not expert_TK.is_contiguous():
        return None
    (num_tokens, top_k), shared_by = expert_TK.shape, expert_TK.shape[1] if x.dim() == 2 else 1
    x_PD = x_PD.contiguous()
    if few_pairs(num_tokens, top_k, codes.code.shape[0]) or not has_units(x.device):
        if cuda_packed.takes(x_PD, codes):
            y_PO = cuda_packed.packed_pairs(x_PD, codes, expert_TK, x_shared_by=shared_by)
        else:
            y_PO = packed_gemv(x_PD, codes, expert_TK=expert_TK, x_shared_by=shared_by)
    else:
        groups = sort_pairs(expert_TK, codes.code.shape[0])
        x_by = BY_TOKEN.value if x.dim() == 2 else BY_PAIR.value
        y_PO = grouped_product(x_PD, codes, groups, top_k, x_by=x_by)
    return y_PO.view(*expert_TK.shape, -1)


def _streams(x_TD: Tensor, gate_up: Codes, down: Codes, top_k: int) -> bool:
    """True if packed_stream.cu takes both products of the experts of a single token."""
    return (
        len(x_TD) == 1
        and packed_stream.takes_experts(x_TD, 1, gate_up)
        and packed_stream.takes_experts(x_TD, top_k, down)
    )


def takes(x_PD: Tensor, codes: Codes) -> bool:
    """True if the kernels of experts can multiply these rows."""
    return x_PD.dtype in DTYPES and x_PD.shape[0] > 0 and packed_codes.takes(codes, x_PD.shape[-1])


def has_units(device: torch.device) -> bool:
    return device.type != "cuda" or has_matrix_units(device)


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
    """See `reference.packed.packed_expert_linear`."""
    codes = packed_codes.of_packed(code_EOC, scale_EOG, offset_EOG, table, bits, group)
    found = _expert_linear(x, expert_TK, codes)
    if found is not None:
        return found
    return dequantized.packed_expert_linear(x, expert_TK, *codes[:4], bits, group)


def fp8_expert_linear(
    x: Tensor,
    expert_TK: Tensor,
    weight_EOD: Tensor,
    scale_ERG: Tensor,
    block_rows: int,
    block_columns: int,
) -> Tensor:
    """See `reference.packed.fp8_expert_linear`."""
    codes = packed_codes.of_fp8(weight_EOD, scale_ERG, block_rows, block_columns)
    found = _expert_linear(x, expert_TK, codes)
    if found is not None:
        return found
    return dequantized.fp8_expert_linear(
        x, expert_TK, weight_EOD, scale_ERG, block_rows, block_columns
    )


def run_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up: Codes,
    down: Codes,
    residual_TD: Tensor | None,
    local_X: Tensor | None,
    clamp: Clamp = NO_CLAMP,
) -> Tensor | None:
    """`reference.experts.experts`, or `reference.clamped.packed_clamped_experts`, or None if the
    kernels cannot take these."""
    gate_up_bias_EG, down_bias_ED, alpha, limit = clamp
    size = gate_up.num_rows // 2
    tensors = [one for one in (weight_TK, expert_TK, local_X) if one is not None]
    if (
        not takes(x_TD, gate_up)
        or not packed_codes.takes(down, size)
        or size % 8
        or not all(one.is_contiguous() for one in tensors)
    ):
        return None
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    residual_TD = None if residual_TD is None else residual_TD.contiguous()
    (num_tokens, top_k), num_here = expert_TK.shape, gate_up.code.shape[0]
    num_experts = num_here if local_X is None else len(local_X)
    if few_pairs(num_tokens, top_k, num_experts) or not has_units(x_TD.device):
        is_plain = local_X is None and clamp is NO_CLAMP
        if is_plain and _streams(x_TD, gate_up, down, top_k):
            inner_PF = packed_stream.packed_stream_experts(x_TD, gate_up, expert_TK, silu_mul=True)
            return packed_stream.packed_stream_experts(
                inner_PF, down, expert_TK, factor_1K=weight_TK, residual_1O=residual_TD
            )
        takes_both = all(cuda_packed.takes(x_TD, one) for one in (gate_up, down))
        if local_X is None and limit >= 0 and takes_both:
            inner_PF = cuda_packed.packed_pairs(
                x_TD, gate_up, expert_TK, x_shared_by=top_k, silu_mul=True,
                bias_EO=gate_up_bias_EG, clamp=(alpha, limit) if limit else None,
            )  # fmt: skip
            return cuda_packed.packed_pairs(
                inner_PF, down, expert_TK, factor_TK=weight_TK, residual_TO=residual_TD,
                bias_EO=down_bias_ED,
            )  # fmt: skip
        inner_PF = packed_gemv(
            x_TD,
            gate_up,
            bias_O=gate_up_bias_EG,
            expert_TK=expert_TK,
            local_X=local_X,
            x_shared_by=top_k,
            silu_mul=True,
            alpha=alpha,
            limit=limit,
        )
        return packed_gemv(
            inner_PF,
            down,
            bias_O=down_bias_ED,
            residual_TO=residual_TD,
            expert_TK=expert_TK,
            local_X=local_X,
            factor_TK=weight_TK,
            adds_pairs=True,
        )
    groups = sort_pairs(expert_TK, num_here, local_X)
    inner_PF = grouped_product(
        x_TD, gate_up, groups, top_k, by_place=True, silu_mul=True, bias_EO=gate_up_bias_EG,
        alpha=alpha, limit=limit,
    )  # fmt: skip
    y_PD = grouped_product(
        inner_PF, down, groups, top_k, x_by=BY_PLACE.value, factor_TK=weight_TK,
        bias_EO=down_bias_ED,
    )  # fmt: skip
    return combine(y_PD, expert_TK, residual_TD, local_X)


def _by_real_values(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    matrices: tuple[Tensor, Tensor],
    residual_TD: Tensor | None,
    local_X: Tensor | None,
) -> Tensor:
    """The device's own experts, of gate and up and of down in x's dtype: a graph can hold them."""
    gate_up_EGD, down_EDF = (one.to(x_TD.dtype) for one in matrices)
    return ops.experts(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD, local_X)


def packed_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    code_EGC: Tensor,
    scale_EGG: Tensor,
    offset_EGG: Tensor | None,
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
    """See `reference.packed.packed_experts`."""
    gate_up = (code_EGC, scale_EGG, offset_EGG, table, bits, group)
    down = (
        down_code_EDC, down_scale_EDG, down_offset_EDG, down_table, down_bits, down_group
    )  # fmt: skip
    codes = packed_codes.of_packed(*gate_up), packed_codes.of_packed(*down)
    found = run_experts(x_TD, weight_TK, expert_TK, *codes, residual_TD, local_X)
    if found is not None:
        return found
    matrices = (
        reference.packed.unpacked(*gate_up, x_TD.shape[-1]),
        reference.packed.unpacked(*down, code_EGC.shape[1] // 2),
    )
    return _by_real_values(x_TD, weight_TK, expert_TK, matrices, residual_TD, local_X)


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
    """See `reference.packed.fp8_experts`."""
    gate_up = (gate_up_EGD, scale_ERG, block_rows, block_columns)
    down = (down_EDF, down_scale_ERG, down_block_rows, down_block_columns)
    codes = packed_codes.of_fp8(*gate_up), packed_codes.of_fp8(*down)
    found = run_experts(x_TD, weight_TK, expert_TK, *codes, residual_TD, local_X)
    if found is not None:
        return found
    matrices = reference.packed.of_fp8(*gate_up), reference.packed.of_fp8(*down)
    return _by_real_values(x_TD, weight_TK, expert_TK, matrices, residual_TD, local_X)
