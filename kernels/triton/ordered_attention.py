"""Paged attention of deterministic engines in Triton: the keys of a query are added in one order.

A query's keys are cut into pieces of `order.PIECE_KEYS`, at fixed positions, and a piece into tiles
of `order.KEY_TILE`. A piece has an online softmax of its own, and pieces are merged in ascending
order. Prompts, verified tokens and decode steps run the same code with the same tile of 64 entries
for queries, so the matrix units and the sums of a row are the same in all of them, and what shares
the tile does not matter. In a decode step of few rows several programs take pieces of a row. Then
the last of them to arrive merges the parts, in the same order and with the same arithmetic.

Shapes are those of attention_prefill.py. W workers of a row's key-value head | I pieces
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import order
from nanovllm.kernels.triton.common import (
    LOG2_E,
    NO_SCORE,
    arrival_counters,
    dot,
    exp2,
    from_fp8,
    from_fp8_in_place,
    launch_options,
    load_index,
    num_multiprocessors,
    padded_rows,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)

MAX_HEAD = 256
MERGED = 8  # parts of a row that the merge loads at a time


@triton.jit
def _merged(max_a, sum_a, acc_a, max_b, sum_b, acc_b, UPCAST: tl.constexpr):
    """The softmax of the keys of a, which come first, and of b. Sums are explicit fused
    multiply-adds, so that no compiler chooses which product is rounded."""
    new_max = tl.maximum(max_a, max_b)
    of_a, of_b = exp2(max_a - new_max, UPCAST), exp2(max_b - new_max, UPCAST)
    total = tl.fma(sum_a, of_a, sum_b * of_b)
    return new_max, total, tl.fma(acc_a, of_a, acc_b * of_b)


@triton.jit
def _tile_at(table_at, table_blocks, first_key, owned_S, s_S, h_Hp, STRIDE_BLOCK: tl.constexpr,
             STRIDE_SLOT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
             UPCAST: tl.constexpr):  # fmt: skip
    """Where the entries of a tile are, from the head's first one: [S, H]."""
    if BLOCK % TILE == 0:
        # the pipeline also loads block numbers of tiles beyond the last
        at = table_at + tl.minimum(first_key // BLOCK, table_blocks - 1)
        block = load_index(at, UPCAST).to(tl.int64)
        first = block * STRIDE_BLOCK + first_key % BLOCK * STRIDE_SLOT
        return first + (s_S * STRIDE_SLOT)[:, None] + h_Hp[None, :]
    else:
        key_S = first_key + s_S
        block_S = tl.load(table_at + key_S // BLOCK, mask=owned_S, other=0).to(tl.int64)
        return (block_S * STRIDE_BLOCK + key_S % BLOCK * STRIDE_SLOT)[:, None] + h_Hp[None, :]


@triton.jit
def _attend(
    q_MHp, query_pos_M, begin_tile, end_tile, table_at, table_blocks, k_at, v_at, first_key,
    seq_len, scale_log2,
    K_STRIDE_BLOCK: tl.constexpr, K_STRIDE_SLOT: tl.constexpr,
    V_STRIDE_BLOCK: tl.constexpr, V_STRIDE_SLOT: tl.constexpr,
    HEAD: tl.constexpr, HEAD_P: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    PIECE: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The maxima, sums and results of the tiles begin_tile … end_tile − 1 of keys, merged by
    pieces."""
    QUERIES: tl.constexpr = q_MHp.shape[0]
    h_Hp = tl.arange(0, HEAD_P)
    s_S = tl.arange(0, TILE)
    max_M = tl.full([QUERIES], NO_SCORE, tl.float32)
    sum_M = tl.zeros([QUERIES], tl.float32)
    acc_MHp = tl.zeros([QUERIES, HEAD_P], tl.float32)
    all_max_M, all_sum_M, all_MHp = max_M, sum_M, acc_MHp
    for tile_idx in tl.range(begin_tile, end_tile, num_stages=STAGES):
        key_S = tile_idx * TILE + s_S
        owned_S = (key_S >= first_key) & (key_S < seq_len)
        # slots before the window and past the row's end may hold NaN: they are read as zeros
        mask_SHp = owned_S[:, None] & (h_Hp < HEAD)[None, :]
        k_SHp = tl.load(
            k_at + _tile_at(table_at, table_blocks, tile_idx * TILE, owned_S, s_S, h_Hp,
                            K_STRIDE_BLOCK, K_STRIDE_SLOT, BLOCK, TILE, UPCAST),
            mask=mask_SHp, other=0.0,
        )  # fmt: skip
        v_SHp = tl.load(
            v_at + _tile_at(table_at, table_blocks, tile_idx * TILE, owned_S, s_S, h_Hp,
                            V_STRIDE_BLOCK, V_STRIDE_SLOT, BLOCK, TILE, UPCAST),
            mask=mask_SHp, other=0.0,
        )  # fmt: skip
        if k_at.dtype.element_ty == tl.float8e4nv:
            k_SHp = from_fp8(k_SHp, q_MHp.dtype, UPCAST)
            v_SHp = from_fp8_in_place(v_SHp, q_MHp.dtype, UPCAST)
        score_MS = dot(q_MHp, tl.trans(k_SHp), tl.zeros([QUERIES, TILE], tl.float32), UPCAST)
        seen_MS = (key_S[None, :] <= query_pos_M[:, None]) & (key_S < seq_len)[None, :]
        if WINDOW > 0:
            seen_MS = seen_MS & (key_S[None, :] > query_pos_M[:, None] - WINDOW)
        score_MS = tl.where(seen_MS, score_MS, float("-inf"))
        begins = tile_idx % (PIECE // TILE) == 0
        max_M = tl.where(begins, NO_SCORE, max_M)
        new_max_M = tl.maximum(max_M, tl.max(score_MS, 1) * scale_log2)
        alpha_M = tl.where(begins, 0.0, exp2(max_M - new_max_M, UPCAST))
        prob_MS = exp2(tl.fma(score_MS, scale_log2, -new_max_M[:, None]), UPCAST)
        sum_M = tl.fma(sum_M, alpha_M, tl.sum(prob_MS, 1))
        acc_MHp = dot(prob_MS.to(v_SHp.dtype), v_SHp, acc_MHp * alpha_M[:, None], UPCAST)
        max_M = new_max_M
        if ((tile_idx + 1) % (PIECE // TILE) == 0) | (tile_idx + 1 == end_tile):
            new_M, total_M, new_MHp = _merged(
                all_max_M[:, None], all_sum_M[:, None], all_MHp,
                max_M[:, None], sum_M[:, None], acc_MHp, UPCAST,
            )  # fmt: skip
            all_max_M = tl.reshape(new_M, [QUERIES])
            all_sum_M = tl.reshape(total_M, [QUERIES])
            all_MHp = new_MHp
    return all_max_M, all_sum_M, all_MHp


@triton.jit
def _merge_parts(part_ptr, part_max_ptr, part_sum_ptr, out_at, first_part, begin, end, v_scale,
                 GROUP: tl.constexpr, GROUP_P: tl.constexpr, HEAD: tl.constexpr,
                 HEAD_P: tl.constexpr, MERGED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Merges pieces begin … end − 1 of a row in ascending order, and stores the result."""
    g_Gp = tl.arange(0, GROUP_P)
    h_Hp = tl.arange(0, HEAD_P)
    mask_GpHp = (g_Gp < GROUP)[:, None] & (h_Hp < HEAD)[None, :]
    at_GpHp = g_Gp[:, None] * HEAD + h_Hp[None, :]
    max_Gp1 = tl.full([GROUP_P, 1], NO_SCORE, tl.float32)
    sum_Gp1 = tl.zeros([GROUP_P, 1], tl.float32)
    acc_GpHp = tl.zeros([GROUP_P, HEAD_P], tl.float32)
    for first in range(begin, end, MERGED):
        maxima, sums, accs = (), (), ()
        for i in tl.static_range(MERGED):
            part = (first_part + first + i).to(tl.int64)
            real = first + i < end
            # other multiprocessors wrote these, so .cg bypasses L1
            mask_Gp1 = (g_Gp < GROUP)[:, None] & real
            of_Gp1 = part * GROUP + g_Gp[:, None]
            max_ = tl.load(
                part_max_ptr + of_Gp1, mask=mask_Gp1, other=NO_SCORE, cache_modifier=".cg"
            )
            sum_ = tl.load(part_sum_ptr + of_Gp1, mask=mask_Gp1, other=0.0, cache_modifier=".cg")
            acc_ = tl.load(
                part_ptr + part * (GROUP * HEAD) + at_GpHp, mask=mask_GpHp & real, other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            maxima, sums, accs = maxima + (max_,), sums + (sum_,), accs + (acc_,)  # noqa: RUF005
        for i in tl.static_range(MERGED):
            max_Gp1, sum_Gp1, acc_GpHp = _merged(
                max_Gp1, sum_Gp1, acc_GpHp, maxima[i], sums[i], accs[i], UPCAST
            )
    out_GpHp = acc_GpHp / tl.where(sum_Gp1 > 0, sum_Gp1, 1.0) * v_scale
    tl.store(out_at + at_GpHp, out_GpHp.to(out_at.dtype.element_ty), mask=mask_GpHp)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_blocks", "table_stride", "workers"])
def ordered_attention_kernel(
    q_ptr,  # [T, N, H]
    k_ptr,  # [C, B, K, H]
    v_ptr,  # [C, B, K, H]
    table_ptr,  # [R, P] int32
    seq_len_ptr,  # [R] int32
    q_start_ptr,  # [R + 1] int32, read unless DECODES
    k_scale_ptr,  # [K] fp32, read for an fp8 cache
    v_scale_ptr,  # [K] fp32, read for an fp8 cache
    out_ptr,  # [T, N, H], written
    part_ptr,  # [R, K, I, G, H] fp32, written if SPLITS
    part_max_ptr,  # [R, K, I, G] fp32, written if SPLITS
    part_sum_ptr,  # [R, K, I, G] fp32, written if SPLITS
    arrived_ptr,  # [R, K] int32: zero before and after each launch
    num_tokens,
    num_rows,
    table_blocks,
    table_stride,
    workers,
    scale_log2,
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
    GROUP_P: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,  # entries of a query tile: tokens with GROUP heads each
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,  # the most pieces of a row
    ROWS_P: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
    DECODES: tl.constexpr,
    SPLITS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    MERGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL, EARLY=ONE_ROW)
    TOKENS: tl.constexpr = 1 if DECODES else QUERIES // GROUP
    head_idx = tl.program_id(0) % NUM_KV_HEADS
    if DECODES:
        row_idx = tl.program_id(0) // NUM_KV_HEADS
        first_token = row_idx
        end = row_idx + 1
        seq_len = tl.load(seq_len_ptr + row_idx)
    else:
        # as in attention_prefill.py
        tile_idx = tl.num_programs(0) // NUM_KV_HEADS - 1 - tl.program_id(0) // NUM_KV_HEADS
        segment_Rp = tl.arange(0, ROWS_P)
        start_Rp = tl.load(
            q_start_ptr + segment_Rp - 1,
            mask=(segment_Rp > 0) & (segment_Rp < num_rows + 2), other=0,
        )  # fmt: skip
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
    token_M = (first_token + entry_M // GROUP).to(tl.int64)  # T · N · H may pass 2³¹
    q_head_M = head_idx * GROUP + entry_M % GROUP
    real_M = (entry_M < TOKENS * GROUP) & (token_M < end)
    q_mask_MHp = real_M[:, None] & (h_Hp < HEAD)[None, :]
    q_at_MHp = (token_M * Q_STRIDE_TOKEN + q_head_M * Q_STRIDE_HEAD)[:, None] + h_Hp[None, :]
    q_MHp = tl.load(q_ptr + q_at_MHp, mask=q_mask_MHp, other=0.0)

    # the query of token t is at position seq_len − (end − t); a row without keys has no tile
    first_pos = seq_len - end + first_token
    query_pos_M = first_pos + entry_M // GROUP
    last_pos = tl.minimum(first_pos + TOKENS, seq_len) - 1
    end_tile = tl.where(seq_len > 0, (tl.maximum(last_pos + 1, 0) + TILE - 1) // TILE, 0)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_pos - WINDOW + 1, 0)
    begin_tile = first_key // TILE
    table_at = table_ptr + tl.minimum(tl.maximum(row_idx, 0), num_rows - 1) * table_stride
    k_at, v_at = k_ptr + head_idx * K_STRIDE_HEAD, v_ptr + head_idx * V_STRIDE_HEAD
    v_scale = 1.0
    if k_ptr.dtype.element_ty == tl.float8e4nv:  # as in attention_prefill.py
        scale_log2 = scale_log2 * tl.load(k_scale_ptr + head_idx)
        v_scale = tl.load(v_scale_ptr + head_idx)
    if SPLITS:
        EACH: tl.constexpr = PIECE // TILE
        begin_piece, end_piece = begin_tile // EACH, (end_tile + EACH - 1) // EACH
        first_part = (row_idx * NUM_KV_HEADS + head_idx) * PIECES
        for piece in range(begin_piece + tl.program_id(1), end_piece, workers):
            max_M, sum_M, acc_MHp = _attend(
                q_MHp, query_pos_M, tl.maximum(begin_tile, piece * EACH),
                tl.minimum(end_tile, piece * EACH + EACH), table_at, table_blocks, k_at, v_at,
                first_key, seq_len, scale_log2, K_STRIDE_BLOCK, K_STRIDE_SLOT, V_STRIDE_BLOCK,
                V_STRIDE_SLOT, HEAD, HEAD_P, BLOCK, TILE, PIECE, WINDOW, STAGES, UPCAST,
            )  # fmt: skip
            part = (first_part + piece).to(tl.int64)
            is_head_M = entry_M < GROUP
            tl.store(part_max_ptr + part * GROUP + entry_M, max_M, mask=is_head_M)
            tl.store(part_sum_ptr + part * GROUP + entry_M, sum_M, mask=is_head_M)
            at_MHp = part * (GROUP * HEAD) + entry_M[:, None] * HEAD + h_Hp[None, :]
            tl.store(part_ptr + at_MHp, acc_MHp, mask=is_head_M[:, None] & (h_Hp < HEAD)[None, :])
        # all threads store before the one thread's release; its acquire comes before all loads
        tl.debug_barrier()
        arrived_at = arrived_ptr + tl.program_id(0)
        if tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu") == workers - 1:
            tl.store(arrived_at, 0)
            _merge_parts(
                part_ptr, part_max_ptr, part_sum_ptr,
                out_ptr + (row_idx * NUM_KV_HEADS + head_idx).to(tl.int64) * (GROUP * HEAD),
                first_part, begin_piece, end_piece, v_scale, GROUP, GROUP_P, HEAD, HEAD_P, MERGED,
                UPCAST,
            )  # fmt: skip
    else:
        max_M, sum_M, acc_MHp = _attend(
            q_MHp, query_pos_M, begin_tile, end_tile, table_at, table_blocks, k_at, v_at,
            first_key, seq_len, scale_log2, K_STRIDE_BLOCK, K_STRIDE_SLOT, V_STRIDE_BLOCK,
            V_STRIDE_SLOT, HEAD, HEAD_P, BLOCK, TILE, PIECE, WINDOW, STAGES, UPCAST,
        )  # fmt: skip
        out_MHp = acc_MHp / tl.where(sum_M > 0, sum_M, 1.0)[:, None] * v_scale
        out_at_MHp = ((token_M * NUM_KV_HEADS * GROUP + q_head_M) * HEAD)[:, None] + h_Hp[None, :]
        tl.store(out_ptr + out_at_MHp, out_MHp.to(out_ptr.dtype.element_ty), mask=q_mask_MHp)


class OrderedTile(NamedTuple):
    """The launch: programs for the pieces of a row's key-value head, and tiles in flight."""

    workers: int
    num_stages: int


def ordered_tile(
    num_rows: int, num_kv_heads: int, head_p: int, num_pieces: int, decodes: bool,
    multiprocessors: int, shared_bytes: int,
) -> OrderedTile:  # fmt: skip
    """One worker where rows fill the device; else so many that most have one piece or two."""
    tile_bytes = 2 * order.KEY_TILE * head_p * 2
    num_stages = max(2, min(3, (shared_bytes // 2 - order.QUERIES * head_p * 2) // tile_bytes))
    programs = num_rows * num_kv_heads
    if not decodes or programs >= 2 * multiprocessors:
        return OrderedTile(1, num_stages)
    return OrderedTile(max(1, min(8 * multiprocessors // programs, num_pieces)), num_stages)


def ordered_attention(
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
    launch: OrderedTile | None = None,
) -> Tensor:
    """`reference.attention.paged_attention` of bf16 and fp16 without sinks and ends.

    Raises ValueError for what it does not take. `launch` overrides the tile, for tests.
    """
    dtype, (num_tokens, num_heads, head_dim) = q_TNH.dtype, q_TNH.shape
    given = {"sinks": sinks_N, "ends": end_T}
    others = [name for name, value in given.items() if value is not None]
    if head_dim > MAX_HEAD:
        raise ValueError(
            f"deterministic=True is not supported for heads of {head_dim}: at most {MAX_HEAD}"
        )
    stored = dtype if k_scale_K is None else torch.float8_e4m3fn
    if others or dtype not in (torch.bfloat16, torch.float16) or k_cache_CBKH.dtype is not stored:
        raise ValueError(
            f"ordered_attention takes bf16 and fp16 without {' and '.join(others) or 'others'}, "
            f"not {dtype} with a cache of {k_cache_CBKH.dtype}"
        )
    q_TNH = q_TNH if q_TNH.stride(2) == 1 else q_TNH.contiguous()
    out_TNH = torch.empty((num_tokens, num_heads, head_dim), dtype=dtype, device=q_TNH.device)
    if num_tokens == 0:
        return out_TNH
    (num_rows, num_blocks), device = block_table_RP.shape, q_TNH.device
    block_size, num_kv_heads = k_cache_CBKH.shape[1:3]
    group, decodes = num_heads // num_kv_heads, max_q_len == 1
    queries = max(order.QUERIES, triton.next_power_of_2(group))
    num_pieces = triton.cdiv(num_blocks * block_size, order.PIECE_KEYS)
    tile = launch or ordered_tile(
        num_rows, num_kv_heads, triton.next_power_of_2(head_dim), num_pieces, decodes,
        num_multiprocessors(device), shared_memory_bytes(device),
    )  # fmt: skip
    num_parts = num_rows * num_pieces * num_heads if tile.workers > 1 else 1
    part = torch.empty(num_parts * head_dim, dtype=torch.float32, device=device)
    part_max, part_sum = torch.empty((2, num_parts), dtype=torch.float32, device=device)
    num_tiles = num_rows if decodes else num_tokens // (queries // group) + num_rows + 2
    counters = num_rows * num_kv_heads if tile.workers > 1 else 1
    ordered_attention_kernel[(num_tiles * num_kv_heads, tile.workers)](
        q_TNH,
        k_cache_CBKH,
        v_cache_CBKH,
        block_table_RP,
        seq_len_R,
        q_start_S,
        seq_len_R if k_scale_K is None else k_scale_K,
        seq_len_R if v_scale_K is None else v_scale_K,
        out_TNH,
        part,
        part_max,
        part_sum,
        arrival_counters(device, counters),
        num_tokens,
        num_rows,
        num_blocks,
        block_table_RP.stride(0),
        tile.workers,
        scale * LOG2_E,
        *q_TNH.stride()[:2],
        *k_cache_CBKH.stride()[:3],
        *v_cache_CBKH.stride()[:3],
        **ordered_constants(num_heads, num_kv_heads, head_dim, block_size, num_rows, window),
        QUERIES=queries,
        PIECES=num_pieces if tile.workers > 1 else 0,
        STAGES=tile.num_stages,
        DECODES=decodes,
        SPLITS=tile.workers > 1,
        ONE_ROW=decodes and num_rows == 1,
        UPCAST=device.type != "cuda",
        num_warps=warps_of(head_dim),
        **launch_options(device),
    )
    return out_TNH


def warps_of(head_dim: int) -> int:
    """The warps, by the size of a head alone: how they divide a tile decides the order of sums."""
    return 4 if head_dim <= 128 else 8


def ordered_constants(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, num_rows: int, window: int
) -> dict[str, int]:
    """The kernel's compile-time constants that follow from the model and the bucket."""
    group = num_heads // num_kv_heads
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "GROUP_P": triton.next_power_of_2(group),
        "HEAD": head_dim,
        "HEAD_P": triton.next_power_of_2(head_dim),
        "BLOCK": block_size,
        "TILE": order.KEY_TILE,
        "PIECE": order.PIECE_KEYS,
        "ROWS_P": padded_rows(num_rows),
        "WINDOW": max(0, window),
        "MERGED": MERGED,
    }
