"""Paged attention for prefill (many new tokens a row) in Triton.

Measured on sm_90; docs/gpus.md lists other GPUs. `attention_prefill_hopper` takes most calls there.

Flash attention (Dao 2023, https://arxiv.org/abs/2307.08691) over packed queries and a paged cache.
A program takes a tile of a row's queries for one key-value head and all G query heads of its group,
which share every key and value that is loaded. The launch is static (it depends on T and R only); a
program finds its row from q_start. Keys after a tile's last query or before its first query's
window are not read.

Shapes: T tokens | R rows | P blocks per row | C blocks in the cache | B block size in tokens | N
query heads | K key-value heads | G = N / K | H head size | M = tokens · G entries of a query tile |
S keys in a tile. A name's suffix gives its shape; "p" after a letter: padded to a power of two.
"""

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
    from_fp8,
    from_fp8_in_place,
    launch_options,
    load_index,
    load_sinks,
    padded_rows,
    shared_memory_bytes,
    to_fp16,
    wait_for_earlier_kernels,
)


@triton.jit
def _attend_tiles(
    q_MHp,
    max_M,
    sum_M,
    acc_MHp,
    query_pos_M,
    last_key_M,
    first_tile,
    last_tile,
    table_ptr,
    table_blocks,
    k_ptr,
    v_ptr,
    first_key,
    seq_len,
    scale_log2,
    K_STRIDE_BLOCK: tl.constexpr,
    K_STRIDE_SLOT: tl.constexpr,
    V_STRIDE_BLOCK: tl.constexpr,
    V_STRIDE_SLOT: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds key tiles first_tile .. last_tile − 1 of one row to the online softmax.

    Without MASKED, all queries attend to all these keys.
    """
    h_Hp = tl.arange(0, HEAD_P)
    s_S = tl.arange(0, TILE)
    for tile_idx in range(first_tile, last_tile):
        key_S = tile_idx * TILE + s_S
        owned_S = (key_S >= first_key) & (key_S < seq_len)
        if BLOCK % TILE == 0:
            # the pipeline also loads block numbers of tiles beyond the last
            block_idx = tl.minimum(tile_idx * TILE // BLOCK, table_blocks - 1)
            block = load_index(table_ptr + block_idx, UPCAST).to(tl.int64)
            slot = tile_idx * TILE % BLOCK
            k_at_SHp = k_ptr + (block * K_STRIDE_BLOCK + slot * K_STRIDE_SLOT)
            v_at_SHp = v_ptr + (block * V_STRIDE_BLOCK + slot * V_STRIDE_SLOT)
            k_at_SHp += (s_S * K_STRIDE_SLOT)[:, None] + h_Hp[None, :]
            v_at_SHp += (s_S * V_STRIDE_SLOT)[:, None] + h_Hp[None, :]
        else:
            if MASKED:
                block_S = tl.load(table_ptr + key_S // BLOCK, mask=owned_S, other=0).to(tl.int64)
            else:
                block_S = tl.load(table_ptr + key_S // BLOCK).to(tl.int64)
            k_at_SHp = k_ptr + (
                (block_S * K_STRIDE_BLOCK + key_S % BLOCK * K_STRIDE_SLOT)[:, None] + h_Hp[None, :]
            )
            v_at_SHp = v_ptr + (
                (block_S * V_STRIDE_BLOCK + key_S % BLOCK * V_STRIDE_SLOT)[:, None] + h_Hp[None, :]
            )
        if MASKED:
            # slots before the window and past the row's end may hold NaN: they are read as zeros
            mask_SHp = owned_S[:, None] & (h_Hp < HEAD)[None, :]
            k_SHp = tl.load(k_at_SHp, mask=mask_SHp, other=0.0)
            v_SHp = tl.load(v_at_SHp, mask=mask_SHp, other=0.0)
        elif HEAD_P != HEAD:
            k_SHp = tl.load(k_at_SHp, mask=(h_Hp < HEAD)[None, :], other=0.0)
            v_SHp = tl.load(v_at_SHp, mask=(h_Hp < HEAD)[None, :], other=0.0)
        else:
            k_SHp = tl.load(k_at_SHp)
            v_SHp = tl.load(v_at_SHp)
        if k_ptr.dtype.element_ty == tl.float8e4nv:
            k_SHp, v_SHp = (
                from_fp8(k_SHp, q_MHp.dtype, UPCAST),
                from_fp8_in_place(v_SHp, q_MHp.dtype, UPCAST),
            )
        score_MS = dot(q_MHp, tl.trans(k_SHp), tl.zeros([q_MHp.shape[0], TILE], tl.float32), UPCAST)
        if MASKED:
            seen_MS = key_S[None, :] <= last_key_M[:, None]
            if WINDOW > 0:
                seen_MS = seen_MS & (key_S[None, :] > query_pos_M[:, None] - WINDOW)
            score_MS = tl.where(seen_MS, score_MS, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MS, 1) * scale_log2)
        alpha_M = exp2(max_M - new_max_M, UPCAST)
        # one fused multiply-add scales and shifts a score
        prob_MS = exp2(score_MS * scale_log2 - new_max_M[:, None], UPCAST)
        sum_M = sum_M * alpha_M + tl.sum(prob_MS, 1)
        acc_MHp = dot(prob_MS.to(v_SHp.dtype), v_SHp, acc_MHp * alpha_M[:, None], UPCAST)
        max_M = new_max_M
    return max_M, sum_M, acc_MHp


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_blocks", "table_stride"])
def prefill_kernel(
    q_ptr,  # [T, N, H]
    k_ptr,  # [C, B, K, H]
    v_ptr,  # [C, B, K, H]
    table_ptr,  # [R, P] int32
    seq_len_ptr,  # [R] int32
    q_start_ptr,  # [R + 1] int32
    out_ptr,  # [T, N, H]
    k_scale_ptr,  # [K] fp32, read for an fp8 cache
    v_scale_ptr,  # [K] fp32, read for an fp8 cache
    sinks_ptr,  # [N], None unless HAS_SINKS
    end_ptr,  # [T] int32, None unless HAS_ENDS
    num_tokens,
    num_rows,
    table_blocks,
    table_stride,
    scale_log2,
    # strides are constants, so a thread's addresses within a tile become immediate offsets
    Q_STRIDE_TOKEN: tl.constexpr,
    Q_STRIDE_HEAD: tl.constexpr,
    K_STRIDE_BLOCK: tl.constexpr,
    K_STRIDE_SLOT: tl.constexpr,
    K_STRIDE_HEAD: tl.constexpr,
    V_STRIDE_BLOCK: tl.constexpr,
    V_STRIDE_SLOT: tl.constexpr,
    V_STRIDE_HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,  # entries of a query tile: QUERIES // GROUP tokens with GROUP heads
    TILE: tl.constexpr,
    ROWS_P: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    TOKENS: tl.constexpr = QUERIES // GROUP
    head_idx = tl.program_id(0) % NUM_KV_HEADS
    # late tiles of a row see the most keys, so they start first and the last programs are short
    tile_idx = tl.num_programs(0) // NUM_KV_HEADS - 1 - tl.program_id(0) // NUM_KV_HEADS

    # Segments: the tokens before row 0, the rows, the tokens after the last row. Segment i begins
    # at tile start_i // TOKENS + i: that leaves every segment enough tiles wherever it starts.
    segment_Rp = tl.arange(0, ROWS_P)
    start_Rp = tl.load(
        q_start_ptr + segment_Rp - 1, mask=(segment_Rp > 0) & (segment_Rp < num_rows + 2), other=0
    )
    begun_Rp = (segment_Rp < num_rows + 2) & (start_Rp // TOKENS + segment_Rp <= tile_idx)
    segment_idx = tl.sum(begun_Rp.to(tl.int32), 0) - 1
    row_idx = segment_idx - 1
    is_row = (segment_idx > 0) & (segment_idx <= num_rows)
    start = tl.load(q_start_ptr + row_idx, mask=segment_idx > 0, other=0)
    end = tl.load(q_start_ptr + segment_idx, mask=segment_idx <= num_rows, other=num_tokens)
    seq_len = tl.load(seq_len_ptr + row_idx, mask=is_row, other=0)
    first_token = start + (tile_idx - start // TOKENS - segment_idx) * TOKENS
    if first_token >= end:
        return

    entry_M = tl.arange(0, QUERIES)
    h_Hp = tl.arange(0, HEAD_P)
    token_M = first_token + entry_M // GROUP
    q_head_M = head_idx * GROUP + entry_M % GROUP
    q_mask_MHp = ((entry_M < TOKENS * GROUP) & (token_M < end))[:, None] & (h_Hp < HEAD)[None, :]
    token_M = token_M.to(tl.int64)  # T · N · H may pass 2³¹
    q_at_MHp = (token_M * Q_STRIDE_TOKEN + q_head_M * Q_STRIDE_HEAD)[:, None] + h_Hp[None, :]
    q_MHp = tl.load(q_ptr + q_at_MHp, mask=q_mask_MHp, other=0.0)
    # keys and values of an fp8 cache are used unscaled: the head's key scale multiplies the scores
    # and its value scale the result
    FP8: tl.constexpr = k_ptr.dtype.element_ty == tl.float8e4nv
    if FP8:
        scale_log2 = scale_log2 * tl.load(k_scale_ptr + head_idx)
        q_MHp = to_fp16(q_MHp, UPCAST)
    max_M = tl.full([QUERIES], NO_SCORE, tl.float32)
    sum_M = tl.zeros([QUERIES], tl.float32)
    acc_MHp = tl.zeros([QUERIES, HEAD_P], tl.float32)

    # the query of token t is at position seq_len − (end − t); a row without keys has no tile
    first_pos = seq_len - end + first_token
    last_pos = tl.minimum(first_pos + TOKENS, seq_len) - 1
    query_pos_M = first_pos + entry_M // GROUP
    last_key_M = query_pos_M
    if HAS_ENDS:
        end_M = tl.load(
            end_ptr + token_M, mask=(entry_M < TOKENS * GROUP) & (token_M < end), other=0
        )
        last_key_M = tl.minimum(tl.maximum(query_pos_M, end_M - 1), seq_len - 1)
        last_pos = tl.maximum(last_pos, tl.max(tl.where(end_M > 0, last_key_M, 0), 0))
    end_tile = tl.where(seq_len > 0, (tl.maximum(last_pos + 1, 0) + TILE - 1) // TILE, 0)
    begin_tile = 0
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_pos - WINDOW + 1, 0)
        begin_tile = first_key // TILE
        full_tile = begin_tile
    else:
        full_tile = tl.minimum(tl.maximum(first_pos + 1, 0) // TILE, end_tile)
    # tokens of no row read nothing, but the pipeline loads a first block number for them
    table_at = table_ptr + tl.minimum(tl.maximum(row_idx, 0), num_rows - 1) * table_stride
    k_at = k_ptr + head_idx * K_STRIDE_HEAD
    v_at = v_ptr + head_idx * V_STRIDE_HEAD
    if WINDOW <= 0:
        max_M, sum_M, acc_MHp = _attend_tiles(
            q_MHp, max_M, sum_M, acc_MHp, query_pos_M, last_key_M, begin_tile, full_tile,
            table_at, table_blocks, k_at, v_at, first_key, seq_len, scale_log2,
            K_STRIDE_BLOCK, K_STRIDE_SLOT, V_STRIDE_BLOCK, V_STRIDE_SLOT,
            False, HEAD, HEAD_P, BLOCK, TILE, WINDOW, UPCAST,
        )  # fmt: skip
    max_M, sum_M, acc_MHp = _attend_tiles(
        q_MHp, max_M, sum_M, acc_MHp, query_pos_M, last_key_M, full_tile, end_tile,
        table_at, table_blocks, k_at, v_at, first_key, seq_len, scale_log2,
        K_STRIDE_BLOCK, K_STRIDE_SLOT, V_STRIDE_BLOCK, V_STRIDE_SLOT,
        True, HEAD, HEAD_P, BLOCK, TILE, WINDOW, UPCAST,
    )  # fmt: skip
    if HAS_SINKS:  # the sum of a row without keys becomes infinite
        is_head_M = entry_M < TOKENS * GROUP
        sum_M += tl.exp2(load_sinks(sinks_ptr + q_head_M, is_head_M) - max_M)
    out_MHp = acc_MHp / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
    if FP8:
        out_MHp *= tl.load(v_scale_ptr + head_idx)
    out_at_MHp = ((token_M * NUM_KV_HEADS * GROUP + q_head_M) * HEAD)[:, None] + h_Hp[None, :]
    tl.store(out_ptr + out_at_MHp, out_MHp.to(out_ptr.dtype.element_ty), mask=q_mask_MHp)


class PrefillTile(NamedTuple):
    """Tile sizes and launch options of a prefill launch."""

    queries: int  # entries of a query tile
    tile: int  # tokens in a tile of keys
    num_warps: int
    num_stages: int


def prefill_tile(
    head_p: int, element_size: int, block_size: int, max_q_len: int, shared_bytes: int
) -> PrefillTile:
    """The launch for padded head size head_p if the longest row has max_q_len new tokens.

    Shared memory holds the queries and some tiles of keys and of values. The sizes for 227 KB are
    the fastest measured on an H200. Those for 99 KB (sm_86, sm_89, sm_120) and for 64 KB, where
    Triton multiplies on Turing's ordinary cores as it does for fp32, are chosen to fit and not
    measured.
    """
    if head_p > 256:
        return _tile_of_large_heads(element_size, shared_bytes)
    if element_size == 4:  # fp32 has no matrix units: small tiles stay within the registers
        return PrefillTile(16, 16, 4, 2) if head_p > 128 else PrefillTile(32, 32, 4, 2)
    if shared_bytes <= 64 * 1024:
        return PrefillTile(16, 16, 4, 2) if head_p > 128 else PrefillTile(32, 32, 4, 2)
    if shared_bytes < 160 * 1024:
        return PrefillTile(64, 32 if head_p > 128 else 64, 4, 2)
    tile = 32 if head_p > 128 or max_q_len <= 1024 else 64
    # if a tile spans blocks, the load of its block numbers takes pipeline stages, too
    return PrefillTile(64, tile, 4, 5 if block_size % tile and head_p <= 128 else 3)


def _tile_of_large_heads(element_size: int, shared_bytes: int) -> PrefillTile:
    """The launch for heads of 512: small tiles, whose sums fit in the registers. Not measured."""
    if element_size == 4 or shared_bytes < 80 * 1024:
        return PrefillTile(16, 16, 4, 1)
    if shared_bytes < 160 * 1024:
        return PrefillTile(16, 16, 4, 2)
    return PrefillTile(32, 32, 8, 2)


def prefill_constants(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_rows: int,
    window: int,
    queries: int,
    tile: int,
) -> dict[str, int]:
    """The kernel's compile-time constants."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "HEAD": head_dim,
        "HEAD_P": triton.next_power_of_2(head_dim),
        "BLOCK": block_size,
        "QUERIES": queries,
        "TILE": tile,
        "ROWS_P": padded_rows(num_rows),
        "WINDOW": max(0, window),
    }


def paged_attention_prefill(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    launch: PrefillTile | None = None,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
    sinks_N: Tensor | None = None,
    end_T: Tensor | None = None,
) -> Tensor:
    """Causal softmax(q · kᵀ · scale) · v of the new tokens, as
    `reference.attention.paged_attention`.

    The scale must be positive. `launch` overrides the tile sizes, for measurements.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_rows = block_table_RP.shape[0]
    block_size, num_kv_heads = k_cache_CBKH.shape[1:3]
    if scale <= 0:
        raise ValueError(f"attention scale must be positive, got {scale}")
    if q_TNH.stride(2) != 1:
        q_TNH = q_TNH.contiguous()
    out_TNH = torch.empty((num_tokens, num_heads, head_dim), dtype=q_TNH.dtype, device=q_TNH.device)
    if num_tokens == 0:
        return out_TNH
    head_p, group = triton.next_power_of_2(head_dim), num_heads // num_kv_heads
    shared_bytes = shared_memory_bytes(q_TNH.device)
    launch = launch or prefill_tile(
        head_p, q_TNH.element_size(), block_size, max_q_len, shared_bytes
    )
    queries = max(launch.queries, triton.next_power_of_2(group))
    constants = prefill_constants(
        num_heads, num_kv_heads, head_dim, block_size, num_rows, window, queries, launch.tile
    )
    num_tiles = num_tokens // (queries // group) + num_rows + 2
    prefill_kernel[(num_tiles * num_kv_heads,)](
        q_TNH,
        k_cache_CBKH,
        v_cache_CBKH,
        block_table_RP,
        seq_len_R,
        q_start_S,
        out_TNH,
        seq_len_R if k_scale_K is None else k_scale_K,
        seq_len_R if v_scale_K is None else v_scale_K,
        sinks_N,
        end_T,
        num_tokens,
        num_rows,
        block_table_RP.shape[1],
        block_table_RP.stride(0),
        scale * LOG2_E,
        *q_TNH.stride()[:2],
        *k_cache_CBKH.stride()[:3],
        *v_cache_CBKH.stride()[:3],
        **constants,
        HAS_SINKS=sinks_N is not None,
        HAS_ENDS=end_T is not None,
        UPCAST=q_TNH.device.type != "cuda",
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(q_TNH.device),
    )
    return out_TNH
