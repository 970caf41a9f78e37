"""`reference.attention.varlen_attention` by torch's own kernels.

On a CPU each segment is one call of scaled_dot_product_attention, so windows cost what they need.
The lengths are read on the host, where they are anyway.

On CUDA the engine uses `triton.varlen_attention`. `scripts/bench/vision_tower.py` compares torch's
kernels with it. One of them takes all segments and reads their starts on the device, so the call
can be captured. It launches max_len / 128 blocks of queries for each segment and head, and those
beyond a segment's end stop at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

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


def segment_attention_cpu(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    start_S: Tensor,
    max_len: int,
    scale: float,
    left: int,
    right: int,
) -> Tensor:
    """`reference.attention.segment_attention`; neighbours of one length are one call."""
    has_groups = q_TNH.shape[1] > k_TKH.shape[1]
    starts = start_S.tolist()
    parts = [q_TNH.new_zeros((starts[0], *q_TNH.shape[1:]))] if starts[0] else []
    for start, end, length in _runs(starts):
        q, k, v = (
            x_TNH[start:end].unflatten(0, (-1, length)).transpose(1, 2)
            for x_TNH in (q_TNH, k_TKH, v_TKH)
        )
        mask, is_causal = _mask(length, left, right)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=has_groups
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    num_left = q_TNH.shape[0] - starts[-1]
    if num_left or not parts:
        parts.append(q_TNH.new_zeros((num_left, *q_TNH.shape[1:])))
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _runs(starts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of segments of one length: begin, end, and the length. Empty ones are left out."""
    lengths = [end - start for start, end in pairwise(starts)]
    at = starts[0]
    for length, run in groupby(filter(None, lengths)):
        end = at + length * len(list(run))
        yield at, end, length
        at = end


def _mask(length: int, left: int, right: int) -> tuple[Tensor | None, bool]:
    """The mask of a segment, and whether it is causal; limits beyond its ends are none."""
    limits_left, limits_right = 0 <= left < length - 1, 0 <= right < length - 1
    if not (limits_left or limits_right):
        return None, False
    if not limits_left and right == 0:
        return None, True
    ahead_LL = torch.arange(length) - torch.arange(length).unsqueeze(1)
    seen_LL = torch.ones(length, length, dtype=torch.bool)
    if limits_left:
        seen_LL &= ahead_LL >= -left
    if limits_right:
        seen_LL &= ahead_LL <= right
    return seen_LL, False


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
