"""Attention within segments without a cache, in Triton: of vision towers, and of models that pool.

Flash attention (Dao 2023, https://arxiv.org/abs/2307.08691) over packed segments. A program takes
the queries of one tile of one segment, for one head. The launch is static (it depends on T and on
the number of starts only); a program finds its segment from the starts, and programs that find none
stop at once. `scripts/bench/vision_tower.py` measures it.

A head is read as two parts, of which each is a power of two: 80 = 64 + 16. One part of 128 would
cost 1.6 times the products.

Shapes: T tokens | N heads | H head size | S starts of segments | M queries in a tile | K keys in a
tile | A, B the two parts of a head, B is 0 if one part is enough
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import (
    LOG2_E,
    NO_SCORE,
    dot,
    exp2,
    launch_options,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)

MAX_HEAD = 128
SMALLEST_PART = 16  # of a product in Triton


@triton.jit
def _part(
    row_at_R,
    inside_R,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns FIRST .. FIRST + SIZE − 1 of rows; zeros behind HEAD and, if MASKED, outside."""
    h_C = FIRST + tl.arange(0, SIZE)
    at_RC = row_at_R[:, None] + h_C[None, :]
    if MASKED:
        return tl.load(at_RC, mask=inside_R[:, None] & (h_C < HEAD)[None, :], other=0.0)
    elif FIRST + SIZE > HEAD:
        return tl.load(at_RC, mask=(h_C < HEAD)[None, :], other=0.0)
    else:
        return tl.load(at_RC)


@triton.jit
def _attend_tiles(
    q_MA,
    q_MB,
    max_M,
    sum_M,
    acc_MA,
    acc_MB,
    first_tile,
    last_tile,
    k_ptr,
    v_ptr,
    num_keys,
    scale_log2,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
    first_query=0,  # its position in the segment, read with LEFT or RIGHT
    LEFT: tl.constexpr = -1,
    RIGHT: tl.constexpr = -1,
):
    """Adds key tiles first_tile .. last_tile − 1 of one segment to the online softmax.

    Without MASKED, all keys of these tiles are keys of the segment.
    """
    for tile_idx in range(first_tile, last_tile):
        key_K = tile_idx * TILE + tl.arange(0, TILE)
        inside_K = key_K < num_keys
        k_at_K, v_at_K = k_ptr + key_K * K_STRIDE, v_ptr + key_K * V_STRIDE
        # what follows the segment may be NaN: it is read as zeros
        k_KA = _part(k_at_K, inside_K, 0, A, HEAD, MASKED)
        v_KA = _part(v_at_K, inside_K, 0, A, HEAD, MASKED)
        score_MK = dot(q_MA, tl.trans(k_KA), tl.zeros([q_MA.shape[0], TILE], tl.float32), UPCAST)
        if B > 0:
            k_KB = _part(k_at_K, inside_K, A, B, HEAD, MASKED)
            v_KB = _part(v_at_K, inside_K, A, B, HEAD, MASKED)
            score_MK = dot(q_MB, tl.trans(k_KB), score_MK, UPCAST)
        if MASKED:
            seen_MK = inside_K[None, :]
            if LEFT >= 0 or RIGHT >= 0:
                query_M = first_query + tl.arange(0, q_MA.shape[0])
                ahead_MK = key_K[None, :] - query_M[:, None]
                if LEFT >= 0:
                    seen_MK = seen_MK & (ahead_MK >= -LEFT)
                if RIGHT >= 0:
                    seen_MK = seen_MK & (ahead_MK <= RIGHT)
            score_MK = tl.where(seen_MK, score_MK, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MK, 1) * scale_log2)
        alpha_M = exp2(max_M - new_max_M, UPCAST)
        # one fused multiply-add scales and shifts a score
        prob_MK = exp2(score_MK * scale_log2 - new_max_M[:, None], UPCAST)
        sum_M = sum_M * alpha_M + tl.sum(prob_MK, 1)
        weight_MK = prob_MK.to(v_KA.dtype)
        acc_MA = dot(weight_MK, v_KA, acc_MA * alpha_M[:, None], UPCAST)
        if B > 0:
            acc_MB = dot(weight_MK, v_KB, acc_MB * alpha_M[:, None], UPCAST)
        max_M = new_max_M
    return max_M, sum_M, acc_MA, acc_MB


@triton.jit
def _seen_tiles(
    num_keys,
    first_query,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """The first tile of keys that a tile of queries reads, the first and the end of those that all
    its queries see whole, and the end of those that it reads."""
    first_tile, whole_from = 0, 0
    whole_to, end_tile = num_keys // TILE, tl.cdiv(num_keys, TILE)
    if LEFT >= 0:
        first_tile = tl.maximum(first_query - LEFT, 0) // TILE
        whole_from = tl.cdiv(tl.maximum(first_query + QUERIES - 1 - LEFT, 0), TILE)
    if RIGHT >= 0:
        whole_to = tl.minimum(whole_to, (first_query + RIGHT + 1) // TILE)
        end_tile = tl.minimum(end_tile, tl.cdiv(first_query + QUERIES + RIGHT, TILE))
    if LEFT >= 0 or RIGHT >= 0:
        whole_from = tl.minimum(whole_from, end_tile)
        whole_to = tl.maximum(whole_from, whole_to)
    return first_tile, whole_from, whole_to, end_tile


@triton.jit
def _segment_of(start_ptr, num_starts, tile_idx, QUERIES: tl.constexpr, LOG_STARTS: tl.constexpr):
    """The number of the segment that the tile belongs to, by a binary search.

    Segment s begins at tile start_s // QUERIES + s: that leaves every segment enough tiles wherever
    it starts. The last start begins the tokens after all segments.
    """
    segment = 0
    for bit in tl.static_range(LOG_STARTS):
        probe = segment + (1 << (LOG_STARTS - 1 - bit))
        start = tl.load(start_ptr + probe, mask=probe < num_starts, other=0)
        begun = (probe < num_starts) & (start // QUERIES + probe <= tile_idx)
        segment = tl.where(begun, probe, segment)
    return segment


@triton.jit
def _store_part(
    row_at_M, inside_M, out_MC, FIRST: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr
):
    h_C = FIRST + tl.arange(0, SIZE)
    mask_MC = inside_M[:, None] & (h_C < HEAD)[None, :]
    tl.store(row_at_M[:, None] + h_C[None, :], out_MC, mask=mask_MC)


@triton.jit(do_not_specialize=["num_tokens", "num_starts"])
def varlen_attention_kernel(
    q_ptr,  # [T, N, H]
    k_ptr,  # [T, N / GROUP, H]
    v_ptr,  # [T, N / GROUP, H]
    segment_start_ptr,  # [S] int32
    out_ptr,  # [T, N, H]
    num_tokens,
    num_starts,
    scale_log2,
    # strides are constants, so a thread's addresses within a tile become immediate offsets
    Q_STRIDE_TOKEN: tl.constexpr,
    Q_STRIDE_HEAD: tl.constexpr,
    K_STRIDE_TOKEN: tl.constexpr,
    K_STRIDE_HEAD: tl.constexpr,
    V_STRIDE_TOKEN: tl.constexpr,
    V_STRIDE_HEAD: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    LOG_STARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
    GROUP: tl.constexpr = 1,
    LEFT: tl.constexpr = -1,
    RIGHT: tl.constexpr = -1,
):
    wait_for_earlier_kernels(PDL)
    head_idx = tl.program_id(0) % NUM_HEADS
    tile_idx = tl.program_id(0) // NUM_HEADS
    segment = _segment_of(segment_start_ptr, num_starts, tile_idx, QUERIES, LOG_STARTS)
    start = tl.load(segment_start_ptr + segment)
    is_segment = segment + 1 < num_starts
    end = tl.load(segment_start_ptr + segment + 1, mask=is_segment, other=num_tokens)
    first_token = start + (tile_idx - start // QUERIES - segment) * QUERIES
    if (first_token < start) | (first_token >= end):
        return

    m_M = tl.arange(0, QUERIES)
    inside_M = first_token + m_M < end
    token_M = first_token.to(tl.int64) + m_M  # T · N · H may pass 2³¹
    q_at_M = q_ptr + head_idx * Q_STRIDE_HEAD + token_M * Q_STRIDE_TOKEN
    q_MA = _part(q_at_M, inside_M, 0, A, HEAD, True)
    q_MB, acc_MB = q_MA, tl.zeros([QUERIES, 1], tl.float32)  # neither is used unless B > 0
    if B > 0:
        q_MB = _part(q_at_M, inside_M, A, B, HEAD, True)
        acc_MB = tl.zeros([QUERIES, B], tl.float32)
    max_M = tl.full([QUERIES], NO_SCORE, tl.float32)
    sum_M = tl.zeros([QUERIES], tl.float32)
    acc_MA = tl.zeros([QUERIES, A], tl.float32)

    num_keys = tl.where(is_segment, end - start, 0)
    first_query = first_token - start
    first_tile, whole_from, whole_to, end_tile = _seen_tiles(
        num_keys, first_query, QUERIES, TILE, LEFT, RIGHT
    )
    kv_head_idx = head_idx // GROUP
    k_at = k_ptr + kv_head_idx * K_STRIDE_HEAD + start.to(tl.int64) * K_STRIDE_TOKEN
    v_at = v_ptr + kv_head_idx * V_STRIDE_HEAD + start.to(tl.int64) * V_STRIDE_TOKEN
    if LEFT >= 0:
        max_M, sum_M, acc_MA, acc_MB = _attend_tiles(
            q_MA, q_MB, max_M, sum_M, acc_MA, acc_MB, first_tile, whole_from, k_at, v_at, num_keys,
            scale_log2, K_STRIDE_TOKEN, V_STRIDE_TOKEN, True, HEAD, A, B, TILE, UPCAST,
            first_query, LEFT, RIGHT,
        )  # fmt: skip
    max_M, sum_M, acc_MA, acc_MB = _attend_tiles(
        q_MA, q_MB, max_M, sum_M, acc_MA, acc_MB, whole_from, whole_to, k_at, v_at, num_keys,
        scale_log2, K_STRIDE_TOKEN, V_STRIDE_TOKEN, False, HEAD, A, B, TILE, UPCAST,
    )  # fmt: skip
    max_M, sum_M, acc_MA, acc_MB = _attend_tiles(
        q_MA, q_MB, max_M, sum_M, acc_MA, acc_MB, whole_to, end_tile, k_at, v_at, num_keys,
        scale_log2, K_STRIDE_TOKEN, V_STRIDE_TOKEN, True, HEAD, A, B, TILE, UPCAST,
        first_query, LEFT, RIGHT,
    )  # fmt: skip
    inverse_M1 = (1.0 / tl.where(sum_M > 0, sum_M, 1.0))[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out_at_M = out_ptr + (token_M * NUM_HEADS + head_idx) * HEAD
    _store_part(out_at_M, inside_M, (acc_MA * inverse_M1).to(dtype), 0, A, HEAD)
    if B > 0:
        _store_part(out_at_M, inside_M, (acc_MB * inverse_M1).to(dtype), A, B, HEAD)


class VarlenTile(NamedTuple):
    """Tile sizes and launch options."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def varlen_tile(head_dim: int, element_size: int, max_len: int, shared_bytes: int) -> VarlenTile:
    """The launch for segments of up to `max_len` tokens.

    Shared memory holds the queries and some tiles of keys and of values. The tiles of heads of 64
    and 80 are the fastest of nine on an H200 (docs/log.md). Those of other heads and GPUs are not
    measured.
    """
    # fp32 has no matrix units, and Triton uses those of Turing neither: small tiles stay within the
    # registers. AMD has 64 KB, too.
    if element_size == 4 or shared_bytes <= 64 * 1024:
        return VarlenTile(32, 32, 4, 2) if head_dim <= 80 else VarlenTile(16, 16, 4, 2)
    if shared_bytes < 160 * 1024:
        return VarlenTile(64, 64, 4, 2)
    if max_len <= 64:
        return VarlenTile(64, 32, 4, 3)
    if head_dim <= 64:
        return VarlenTile(64, 64, 4, 2)
    return VarlenTile(128, 64, 4, 3) if head_dim <= 80 else VarlenTile(128, 64, 8, 2)


def head_parts(head_dim: int) -> tuple[int, int]:
    """A and B: the parts of a head, zero-padded; each is a power of two, and B may be 0."""
    whole = max(SMALLEST_PART, triton.next_power_of_2(head_dim))
    rest = max(SMALLEST_PART, triton.next_power_of_2(head_dim - whole // 2))
    has_two = whole // 2 >= SMALLEST_PART and whole // 2 + rest < whole
    return (whole // 2, rest) if has_two else (whole, 0)


def varlen_constants(
    num_heads: int, head_dim: int, num_starts: int, tile: VarlenTile
) -> dict[str, int]:
    """The kernel's compile-time constants, without strides."""
    first, second = head_parts(head_dim)
    return {
        "NUM_HEADS": num_heads,
        "HEAD": head_dim,
        "A": first,
        "B": second,
        "QUERIES": tile.queries,
        "TILE": tile.keys,
        "LOG_STARTS": (num_starts - 1).bit_length(),
    }


def varlen_attention(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    start_S: Tensor,
    max_len: int,
    scale: float,
    tile: VarlenTile | None = None,
) -> Tensor:
    """`reference.attention.varlen_attention`; see `segment_attention`."""
    return segment_attention(q_TNH, k_TNH, v_TNH, start_S, max_len, scale, -1, -1, tile)


def segment_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    start_S: Tensor,
    max_len: int,
    scale: float,
    left: int,
    right: int,
    tile: VarlenTile | None = None,
) -> Tensor:
    """`reference.attention.segment_attention`; zeros for tokens after the last segment.

    What is before the first segment stays unwritten. `tile` is for measurements. Raises ValueError
    for heads of more than 128 numbers, and for a scale that is not positive.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    if head_dim > MAX_HEAD:
        raise ValueError(f"heads have {head_dim} numbers: at most {MAX_HEAD} are supported")
    if scale <= 0:
        raise ValueError(f"attention scale must be positive, got {scale}")
    q_TNH, k_TKH, v_TKH = (x if x.stride(2) == 1 else x.contiguous() for x in (q_TNH, k_TKH, v_TKH))
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    if num_tokens == 0:
        return out_TNH
    shared_bytes = shared_memory_bytes(q_TNH.device)
    tile = tile or varlen_tile(head_dim, q_TNH.element_size(), max_len, shared_bytes)
    num_starts = start_S.shape[0]
    num_tiles = num_tokens // tile.queries + num_starts
    varlen_attention_kernel[(num_tiles * num_heads,)](
        q_TNH,
        k_TKH,
        v_TKH,
        start_S,
        out_TNH,
        num_tokens,
        num_starts,
        scale * LOG2_E,
        *q_TNH.stride()[:2],
        *k_TKH.stride()[:2],
        *v_TKH.stride()[:2],
        **varlen_constants(num_heads, head_dim, num_starts, tile),
        UPCAST=q_TNH.device.type != "cuda",
        GROUP=num_heads // k_TKH.shape[1],
        LEFT=left,
        RIGHT=right,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q_TNH.device),
    )
    return out_TNH
