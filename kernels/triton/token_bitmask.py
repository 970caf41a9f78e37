"""Masks of tokens in Triton: one pass over the logits, which reads a bit for each of them.

The time is that of reading and writing the logits. Programs share no data.

Shapes: R rows | S rows of masks | V vocabulary | W words of 32 bits of a mask
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

TILE = 4096
NUM_WARPS = 8


@triton.jit
def apply_token_bitmask_kernel(
    logits_ptr,  # [R, V]
    allowed_ptr,  # [S, W] int32
    row_idx_ptr,  # [R] int64
    out_ptr,  # [R, V], written
    logits_stride,
    vocab_size,
    num_words,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    token_N = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_token_N = token_N < vocab_size
    allowed_at = allowed_ptr + tl.load(row_idx_ptr + row).to(tl.int64) * num_words
    word_N = tl.load(allowed_at + token_N // 32, mask=is_token_N, other=0)
    logit_N = tl.load(logits_ptr + row * logits_stride + token_N, mask=is_token_N, other=0.0)
    is_allowed_N = ((word_N >> (token_N % 32)) & 1) != 0
    kept_N = tl.where(is_allowed_N, logit_N.to(tl.float32), -float("inf"))
    kept_N = kept_N.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * vocab_size + token_N, kept_N, mask=is_token_N)


def apply_token_bitmask(logits_RV: Tensor, allowed_SW: Tensor, row_R: Tensor) -> Tensor:
    """`reference.sample.apply_token_bitmask`."""
    num_rows, vocab_size = logits_RV.shape
    out_RV = torch.empty((num_rows, vocab_size), dtype=logits_RV.dtype, device=logits_RV.device)
    if num_rows == 0:
        return out_RV
    logits_RV = logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()
    apply_token_bitmask_kernel[(num_rows, triton.cdiv(vocab_size, TILE))](
        logits_RV,
        allowed_SW.contiguous(),
        row_R.contiguous(),
        out_RV,
        logits_RV.stride(0),
        vocab_size,
        allowed_SW.shape[1],
        TILE=TILE,
        num_warps=NUM_WARPS,
        **launch_options(logits_RV.device),
    )
    return out_RV
