"""Attention over the cache, and within segments without a cache. Shapes: see the package."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
    sinks_N: Tensor | None = None,
    end_T: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row's newest tokens over that row's blocks.

    Row r owns tokens q_start_S[r] .. q_start_S[r + 1] − 1 (S = R + 1): the last of its seq_len_R[r]
    tokens. The query at position i attends to the keys at positions j with i − window < j <= i
    (window <= 0: all j <= i). With max_q_len 1 (decode) each row has one token, T = R, and
    q_start_S is not read. The output is zero for rows with seq_len 0 and for tokens of no row.
    Cache entries outside a row's first seq_len tokens never affect its output, even if they are
    NaN. With scales (see `store_kv`) keys and values are the cache's entries times their head's
    scale.

    A sink is a score of one more key of a head, whose value is 0: exp(sink) joins the denominator
    of the softmax. It is not multiplied by `scale`, and no window leaves it out. Source: OpenAI
    2025, https://arxiv.org/abs/2508.10925.

    With end_T, int32, the query of token t sees all keys at positions below end_T[t] that are
    within its window, also later ones than itself, as tokens of an image do. It sees itself and
    earlier keys whatever end_T is, and nothing past seq_len. With max_q_len 1 it is not read.
    """
    num_rows, block_size = block_table_RP.shape[0], k_cache_CBKH.shape[1]
    out_TNH = torch.zeros_like(q_TNH)
    if max_q_len == 1:
        # one gather for the whole batch: no host synchronisation
        max_len = block_table_RP.shape[1] * block_size
        k_RPBKH = _scaled(k_cache_CBKH[block_table_RP.long()], k_scale_K)
        v_RPBKH = _scaled(v_cache_CBKH[block_table_RP.long()], v_scale_K)
        k_RLKH, v_RLKH = k_RPBKH.flatten(1, 2), v_RPBKH.flatten(1, 2)
        key_pos_L = torch.arange(max_len, device=q_TNH.device)
        seen_RL = _seen(seq_len_R.unsqueeze(1) - 1, key_pos_L, window)
        out = _attend(q_TNH.unsqueeze(1), k_RLKH, v_RLKH, seen_RL.unsqueeze(1), scale, sinks_N)
        return torch.where((seq_len_R > 0).view(-1, 1, 1), out.squeeze(1), out_TNH)
    starts, seq_lens = q_start_S.tolist(), seq_len_R.tolist()
    for row in range(num_rows):
        start, end, seq_len = starts[row], starts[row + 1], seq_lens[row]
        if end == start or seq_len == 0:
            continue
        blocks = block_table_RP[row, : -(-seq_len // block_size)].long()
        k_LKH = _scaled(k_cache_CBKH[blocks], k_scale_K).flatten(0, 1)[:seq_len]
        v_LKH = _scaled(v_cache_CBKH[blocks], v_scale_K).flatten(0, 1)[:seq_len]
        query_pos = torch.arange(seq_len - (end - start), seq_len, device=q_TNH.device)
        last_pos = query_pos
        if end_T is not None:
            last_pos = torch.maximum(query_pos, end_T[start:end].long() - 1)
        key_pos = torch.arange(seq_len, device=q_TNH.device)
        seen_TL = _seen(query_pos.unsqueeze(1), key_pos, window, last_pos.unsqueeze(1))
        out_TNH[start:end] = _attend(
            q_TNH[None, start:end], k_LKH[None], v_LKH[None], seen_TL[None], scale, sinks_N
        )[0]
    return out_TNH


def varlen_attention(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, start_S: Tensor, max_len: int, scale: float
) -> Tensor:
    """Attention in both directions within segments: softmax(q · kᵀ · scale) · v, without a cache.

    Segment s owns tokens start_S[s] .. start_S[s + 1] − 1, at most `max_len` of them. `start_S` is
    int32 and ascends; segments may be empty. Each query attends to all keys of its segment. Tokens
    outside start_S[0] .. start_S[−1] − 1 belong to no segment: they never affect others, even if
    they are NaN, and kernels may leave their output unwritten. Here it is zero.
    """
    token_T = torch.arange(q_TNH.shape[0], device=q_TNH.device)
    segment_T = (token_T.unsqueeze(1) >= start_S).sum(1)
    owned_T = (segment_T > 0) & (segment_T < start_S.shape[0])
    seen_TT = (segment_T.unsqueeze(1) == segment_T) & owned_T
    return _attend(q_TNH[None], k_TNH[None], v_TNH[None], seen_TT[None], scale)[0].contiguous()


def segment_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    start_S: Tensor,
    max_len: int,
    scale: float,
    left: int,
    right: int,
) -> Tensor:
    """`varlen_attention` with fewer heads of keys and values than of queries, and with a mask.

    The query at position i of its segment attends to the keys at positions j of the same segment
    with i − left <= j <= i + right. A negative number is no limit on that side: (−1, 0) is causal,
    (window − 1, 0) is causal within a window, and (−1, −1) is both directions. Query head n reads
    head n // (N / K) of keys and values.
    """
    token_T = torch.arange(q_TNH.shape[0], device=q_TNH.device)
    segment_T = (token_T.unsqueeze(1) >= start_S).sum(1)
    owned_T = (segment_T > 0) & (segment_T < start_S.shape[0])
    seen_TT = (segment_T.unsqueeze(1) == segment_T) & owned_T
    ahead_TT = token_T - token_T.unsqueeze(1)
    if left >= 0:
        seen_TT = seen_TT & (ahead_TT >= -left)
    if right >= 0:
        seen_TT = seen_TT & (ahead_TT <= right)
    return _attend(q_TNH[None], k_TKH[None], v_TKH[None], seen_TT[None], scale)[0].contiguous()


def zero_padding_(out_TNH: Tensor, q_start_S: Tensor) -> None:
    """Write zeros to tokens of no row: before q_start_S[0], and from q_start_S[−1] on.

    Kernels of other packages leave these tokens of their result unwritten.
    """
    token_T = torch.arange(out_TNH.shape[0], device=out_TNH.device)
    is_owned_T = (token_T >= q_start_S[0]) & (token_T < q_start_S[-1])
    out_TNH.masked_fill_(~is_owned_T[:, None, None], 0)


def _scaled(x: Tensor, scale_K: Tensor | None) -> Tensor:
    """x [..., K, H] times its head's scale in fp32; x itself without a scale."""
    return x if scale_K is None else x.float() * scale_K[:, None]


def _seen(
    query_pos: Tensor, key_pos: Tensor, window: int, last_pos: Tensor | None = None
) -> Tensor:
    seen = key_pos <= (query_pos if last_pos is None else last_pos)
    return seen & (key_pos > query_pos - window) if window > 0 else seen


def _attend(
    q_RTNH: Tensor,
    k_RLKH: Tensor,
    v_RLKH: Tensor,
    seen_RTL: Tensor,
    scale: float,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Matmul and softmax in fp32. Keys that no query sees are zeroed first: 0 · NaN is NaN."""
    num_rows, num_tokens, num_heads, head_dim = q_RTNH.shape
    num_kv_heads = k_RLKH.shape[2]
    any_seen_RL11 = seen_RTL.any(1)[:, :, None, None]
    k_RKHL = torch.where(any_seen_RL11, k_RLKH, 0).float().permute(0, 2, 3, 1)
    v_RKLH = torch.where(any_seen_RL11, v_RLKH, 0).float().permute(0, 2, 1, 3)
    # query head n reads key-value head n // (N / K): one matrix per key-value head holds the query
    # heads and tokens of its group
    q_RKGTH = (
        q_RTNH.float().view(num_rows, num_tokens, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    )
    score_RKGTL = (q_RKGTH.flatten(2, 3) @ k_RKHL).unflatten(2, (-1, num_tokens)) * scale
    score_RKGTL = score_RKGTL.masked_fill(~seen_RTL[:, None, None], float("-inf"))
    if sinks_N is None:
        prob_RKGTL = score_RKGTL.softmax(-1).nan_to_num(0.0)
    else:
        sink_KG11 = sinks_N.float().view(num_kv_heads, -1, 1, 1)
        sink_RKGT1 = sink_KG11.expand(*score_RKGTL.shape[:-1], 1)
        prob_RKGTL = torch.cat((score_RKGTL, sink_RKGT1), -1).softmax(-1)[..., :-1]
    out_RKGTH = (prob_RKGTL.flatten(2, 3) @ v_RKLH).unflatten(2, (-1, num_tokens))
    return (
        out_RKGTH.permute(0, 3, 1, 2, 4)
        .reshape(num_rows, num_tokens, num_heads, head_dim)
        .to(q_RTNH.dtype)
    )
