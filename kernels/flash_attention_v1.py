"""Paged attention by flash-attn 1, the interface for Turing.

It has no pages, so keys are gathered, and no windows. It needs the lengths on the host, so its
steps cannot be captured. Its causal mask is aligned to the first query and the first key. It is
tested against plain torch that implements its documented signature and has not run on a GPU.

Shapes as in `reference`; U rows with keys and queries | G = N / K.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def paged_attention(
    module: Any,
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
) -> Tensor:
    """`reference.attention.paged_attention` without windows, in fp16."""
    attend = _decode if max_q_len == 1 else _prefill
    return attend(
        module, q_TNH, k_cache_CBKH, v_cache_CBKH, block_table_RP, seq_len_R, q_start_S, scale
    )


def _gathered(cache_CBKH: Tensor, block_table_RP: Tensor, lengths: dict[int, int]) -> Tensor:
    """The cached tokens of some rows ({row: length}), concatenated."""
    block_size = cache_CBKH.shape[1]
    return torch.cat(
        [
            cache_CBKH[block_table_RP[row, : -(-length // block_size)].long()].flatten(0, 1)[
                :length
            ]
            for row, length in lengths.items()
        ]
    )


def _starts(lengths: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def _decode(
    module: Any,
    q_RNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    scale: float,
) -> Tensor:
    """The G query heads of a key-value head become G queries of it, without a mask."""
    out_RNH = torch.zeros(q_RNH.shape, dtype=q_RNH.dtype, device=q_RNH.device)
    lengths = {row: length for row, length in enumerate(seq_len_R.tolist()) if length}
    if not lengths:
        return out_RNH
    rows, num_kv_heads = list(lengths), k_cache_CBKH.shape[2]
    q_UGKH = q_RNH[rows].unflatten(1, (num_kv_heads, -1)).transpose(1, 2)
    group = q_UGKH.shape[1]
    out = module.flash_attn_unpadded_func(
        q_UGKH.flatten(0, 1),
        _gathered(k_cache_CBKH, block_table_RP, lengths),
        _gathered(v_cache_CBKH, block_table_RP, lengths),
        _starts([group] * len(rows), q_RNH.device),
        _starts(lengths.values(), q_RNH.device),
        group,
        max(lengths.values()),
        0.0,
        softmax_scale=scale,
        causal=False,
    )
    out_RNH[rows] = out.unflatten(0, (-1, group)).transpose(1, 2).flatten(1, 2)
    return out_RNH


def _prefill(
    module: Any,
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    scale: float,
) -> Tensor:
    """Pads each row's queries in front to the number of its keys.

    With as many queries as keys, both alignments of the causal mask are the same.
    """
    starts = q_start_S.tolist()
    num_queries = [end - start for start, end in itertools.pairwise(starts)]
    lengths = {
        row: length for row, length in enumerate(seq_len_R.tolist()) if length and num_queries[row]
    }
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    if not lengths:
        return out_TNH
    group = q_TNH.shape[1] // k_cache_CBKH.shape[2]
    # indices of a row's last queries among the padded ones, and among all
    padded_at: list[int] = []
    token_at: list[int] = []
    end = 0
    for row, length in lengths.items():
        end += length
        num = min(num_queries[row], length)
        padded_at += range(end - num, end)
        token_at += range(starts[row + 1] - num, starts[row + 1])
    q = torch.zeros((end, *q_TNH.shape[1:]), dtype=q_TNH.dtype, device=q_TNH.device)
    q[padded_at] = q_TNH[token_at]
    start = _starts(lengths.values(), q_TNH.device)
    longest = max(lengths.values())
    out = module.flash_attn_unpadded_func(
        q,
        _gathered(k_cache_CBKH, block_table_RP, lengths).repeat_interleave(group, dim=1),
        _gathered(v_cache_CBKH, block_table_RP, lengths).repeat_interleave(group, dim=1),
        start,
        start,
        longest,
        longest,
        0.0,
        softmax_scale=scale,
        causal=True,
    )
    out_TNH[token_at] = out[padded_at]
    return out_TNH
