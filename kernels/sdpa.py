"""Paged attention by torch's scaled_dot_product_attention over gathered pages.

It serves GPUs on which neither our kernels nor flash-attn run well, and checks those kernels.
Decode has static shapes and does not wait for the device, so it can be captured. It gathers all
pages of a row's table, so its cost follows max_model_len, not the row's length. Prefill reads the
lengths on the host and runs row by row, so it cannot be captured.

R rows | T tokens of a row | L keys | N query heads | K key-value heads | G = N / K | H head size |
C, B, P as in `reference`
"""

from __future__ import annotations

import torch
from torch import Tensor

SCRATCH_BYTES = 256 << 20  # gathered keys and values at a time, unless one row needs more
QUERY_TOKENS = 512  # tokens of a row at a time: the mask has G times as many rows


def paged_attention_sdpa(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    k_scale_K: None = None,
    v_scale_K: None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """`reference.attention.paged_attention`; torch's kernel for the device and dtype sets the
    precision."""
    if max_q_len == 1:
        rows = (block_table_RP, seq_len_R, scale, window, sinks_N)
        return _decode(q_TNH, k_cache_CBKH, v_cache_CBKH, *rows)
    block_size = k_cache_CBKH.shape[1]
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    starts, seq_lens = q_start_S.tolist(), seq_len_R.tolist()
    for row, seq_len in enumerate(seq_lens):
        # queries before the row's first key see no key
        begin = max(starts[row], starts[row + 1] - seq_len)
        for first in range(begin, starts[row + 1], QUERY_TOKENS):
            end = min(first + QUERY_TOKENS, starts[row + 1])
            first_pos, end_pos = (
                seq_len - (starts[row + 1] - first),
                seq_len - (starts[row + 1] - end),
            )
            first_key = (
                max(0, first_pos - window + 1) // block_size * block_size if window > 0 else 0
            )
            blocks = block_table_RP[row, first_key // block_size : -(-end_pos // block_size)].long()
            key_pos_L = torch.arange(first_key, end_pos, device=q_TNH.device)
            query_pos_T = torch.arange(first_pos, end_pos, device=q_TNH.device)
            seen_TL = key_pos_L <= query_pos_T.unsqueeze(1)
            if window > 0:
                seen_TL &= key_pos_L > query_pos_T.unsqueeze(1) - window
            any_seen_L11 = seen_TL.any(0).view(-1, 1, 1)  # keys before the window may be NaN
            k_LKH, v_LKH = (
                torch.where(any_seen_L11, cache[blocks].flatten(0, 1)[: len(key_pos_L)], 0)
                for cache in (k_cache_CBKH, v_cache_CBKH)
            )
            out_TNH[first:end] = _attend(
                q_TNH[None, first:end], k_LKH[None], v_LKH[None], seen_TL[None], scale, sinks_N
            )[0]
    return out_TNH


def _decode(
    q_RNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    scale: float,
    window: int,
    sinks_N: Tensor | None,
) -> Tensor:
    num_rows, max_len = block_table_RP.shape[0], block_table_RP.shape[1] * k_cache_CBKH.shape[1]
    key_pos_L = torch.arange(max_len, device=q_RNH.device)
    row_bytes = 2 * max_len * k_cache_CBKH[0, 0].numel() * k_cache_CBKH.element_size()
    rows_at_once = max(1, SCRATCH_BYTES // row_bytes)
    outs = []
    for first in range(0, num_rows, rows_at_once):
        rows = slice(first, min(first + rows_at_once, num_rows))
        seq_len_R1 = seq_len_R[rows].unsqueeze(1)
        seen_RL = key_pos_L < seq_len_R1
        if window > 0:
            seen_RL &= key_pos_L >= seq_len_R1 - window
        table_RP = block_table_RP[rows].long()
        # 0 · NaN is NaN, so keys and values that no query sees are zeroed
        k_RLKH, v_RLKH = (
            torch.where(seen_RL[:, :, None, None], cache[table_RP].flatten(1, 2), 0)
            for cache in (k_cache_CBKH, v_cache_CBKH)
        )
        queries, seen_R1L = q_RNH[rows].unsqueeze(1), seen_RL.unsqueeze(1)
        out_R1NH = _attend(queries, k_RLKH, v_RLKH, seen_R1L, scale, sinks_N)
        outs.append(torch.where(seq_len_R1[:, :, None, None] > 0, out_R1NH, 0).squeeze(1))
    return (
        torch.cat(outs) if outs else torch.empty_like(q_RNH, memory_format=torch.contiguous_format)
    )


def _attend(
    q_RTNH: Tensor,
    k_RLKH: Tensor,
    v_RLKH: Tensor,
    seen_RTL: Tensor,
    scale: float,
    sinks_N: Tensor | None,
) -> Tensor:
    """The G query heads of a key-value head become rows of queries of it.

    No key or value is copied for the other heads of a group. A sink is the mask's number for one
    more key, which is 0 and has the value 0.
    """
    num_tokens, num_kv_heads = q_RTNH.shape[1], k_RLKH.shape[2]
    q_RKQH = (
        q_RTNH.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    )  # Q = G · T
    mask_RKQL = seen_RTL.repeat(1, q_RKQH.shape[2] // num_tokens, 1).unsqueeze(1)
    if sinks_N is not None:
        number_RKQL = torch.zeros_like(mask_RKQL, dtype=q_RTNH.dtype)
        number_RKQL = number_RKQL.masked_fill(~mask_RKQL, float("-inf"))
        sink_1KQ1 = sinks_N.to(q_RTNH.dtype).view(1, num_kv_heads, -1, 1)
        sink_1KQ1 = sink_1KQ1.repeat_interleave(num_tokens, 2)
        wanted = (len(q_RTNH), num_kv_heads, q_RKQH.shape[2], -1)
        mask_RKQL = torch.cat((number_RKQL.expand(wanted), sink_1KQ1.expand(wanted)), -1)
        k_RLKH, v_RLKH = (
            torch.nn.functional.pad(x_RLKH, (0, 0, 0, 0, 0, 1)) for x_RLKH in (k_RLKH, v_RLKH)
        )
    out_RKQH = torch.nn.functional.scaled_dot_product_attention(
        q_RKQH, k_RLKH.transpose(1, 2), v_RLKH.transpose(1, 2), attn_mask=mask_RKQL, scale=scale
    )
    return out_RKQH.unflatten(2, (-1, num_tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)
