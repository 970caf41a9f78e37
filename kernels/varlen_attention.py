"""`reference.attention.varlen_attention` by torch's own kernels.

On a CPU each segment is one call of scaled_dot_product_attention, so windows cost what they need.
The lengths are read on the host, where they are anyway.

On CUDA the engine uses `triton.varlen_attention`. `scripts/bench/vision_tower.py` compares torch's
kernels with it. One of them takes all segments and reads their starts on the device, so the call
can be captured. It launches max_len / 128 blocks of queries for each segment and head, and those
beyond a segment's end stop at once.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

NO_MASK = 0  # `custom_mask_type` of torch's memory-efficient kernel


def varlen_attention_cpu(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, start_S: Tensor, max_len: int, scale: float
) -> Tensor:
    """`reference.attention.varlen_attention`, segment by segment."""
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype)
    for start, end in pairwise(start_S.tolist()):
        if start == end:
            continue
        q, k, v = (x_TNH[None, start:end].transpose(1, 2) for x_TNH in (q_TNH, k_TNH, v_TNH))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        out_TNH[start:end] = out[0].transpose(0, 1)
    return out_TNH


def varlen_attention_torch(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, start_S: Tensor, max_len: int, scale: float
) -> Tensor:
    """`reference.attention.varlen_attention` by torch's copy of FlashAttention-2 (bf16, fp16), or
    by its memory-efficient kernel (fp32)."""
    if q_TNH.dtype is torch.float32:
        q, k, v = (x_TNH[None] for x_TNH in (q_TNH, k_TNH, v_TNH))
        found = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, start_S, start_S, max_len, max_len, 0.0, NO_MASK, scale=scale
        )
        return found[0][0]
    found = torch.ops.aten._flash_attention_forward(
        q_TNH, k_TNH, v_TNH, start_S, start_S, max_len, max_len, 0.0, False, False, scale=scale
    )
    return found[0]
