"""Paged attention for decode (one new token a row) in Triton.

Measured on sm_90; docs/gpus.md lists other GPUs.

The row lengths of a batch differ by up to 20×, so neither one program per row nor fixed splits give
equal work. The launch is static, and the kernel divides the work on the device (stream-K, Osama et
al. 2023, https://arxiv.org/abs/2301.03598; flash-decoding, Dao et al. 2023). Each key-value head
has W workers (programs). The keys of all rows are cut into tiles of S tokens and laid end to end.
They are divided into W equal spans, and each worker runs the online softmax over its span. A row
that lies within one span is written directly. A row that crosses span borders leaves one partial
result per span, and the last of its workers to arrive merges them in the order of the spans. So the
result depends on the lengths only, not on timing.

A span is one flat loop over the tiles of all its rows: the first tiles of the next row load while
the last tiles of this row are computed.

Shapes: R rows | P blocks per row | C blocks in the cache | B block size in tokens | N query heads |
K key-value heads | G = N / K query heads per key-value head | M = G padded for the matrix units | H
head size | S tokens in a tile | W workers per key-value head. A name's suffix gives its shape; "p"
after a letter: padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    shared_memory_bytes,
    to_fp16,
    wait_for_earlier_kernels,
)
from nanovllm.kernels.triton.decode_parts import report_part, store_result
from nanovllm.kernels.triton.decode_tiles import DecodeTile, decode_constants, decode_tile


@triton.jit
def _first_tile(seq_len, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The row's first tile that has a key in the window."""
    if WINDOW > 0:
        return tl.maximum(seq_len - WINDOW, 0) // TILE
    else:
        return seq_len * 0


@triton.jit
def _num_tiles(seq_len, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Tiles of a row. An empty row has one tile, all masked, so that its result is zeros."""
    return tl.maximum((seq_len + TILE - 1) // TILE - _first_tile(seq_len, TILE, WINDOW), 1)


@triton.jit
def _tile_addresses(k_ptr, v_ptr, table_at, table_blocks, first_key, seen_S, head_idx, s_S, h_Hp,
                    K_STRIDE_BLOCK: tl.constexpr, K_STRIDE_SLOT: tl.constexpr,
                    K_STRIDE_HEAD: tl.constexpr, V_STRIDE_BLOCK: tl.constexpr,
                    V_STRIDE_SLOT: tl.constexpr, V_STRIDE_HEAD: tl.constexpr, BLOCK: tl.constexpr,
                    TILE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Where the keys and the values of a tile are, each [S, H]."""
    if BLOCK % TILE == 0:
        # the pipeline also loads block numbers of tiles beyond the span
        block = load_index(table_at + tl.minimum(first_key // BLOCK, table_blocks - 1), UPCAST).to(
            tl.int64
        )
        slot = first_key % BLOCK
        k_at = k_ptr + (block * K_STRIDE_BLOCK + slot * K_STRIDE_SLOT + head_idx * K_STRIDE_HEAD)
        v_at = v_ptr + (block * V_STRIDE_BLOCK + slot * V_STRIDE_SLOT + head_idx * V_STRIDE_HEAD)
        k_at_SHp = k_at + ((s_S * K_STRIDE_SLOT)[:, None] + h_Hp[None, :])
        v_at_SHp = v_at + ((s_S * V_STRIDE_SLOT)[:, None] + h_Hp[None, :])
    else:
        key_S = first_key + s_S
        block_S = tl.load(table_at + key_S // BLOCK, mask=seen_S, other=0).to(tl.int64)
        k_at_S = (
            block_S * K_STRIDE_BLOCK + (key_S % BLOCK) * K_STRIDE_SLOT + head_idx * K_STRIDE_HEAD
        )
        v_at_S = (
            block_S * V_STRIDE_BLOCK + (key_S % BLOCK) * V_STRIDE_SLOT + head_idx * V_STRIDE_HEAD
        )
        k_at_SHp = k_ptr + (k_at_S[:, None] + h_Hp[None, :])
        v_at_SHp = v_ptr + (v_at_S[:, None] + h_Hp[None, :])
    return k_at_SHp, v_at_SHp


@triton.jit
def _seen_keys(s_S, first_key, seq_len, WINDOW: tl.constexpr):
    """Which keys of a tile the query attends to."""
    seen_S = s_S < seq_len - first_key
    if WINDOW > 0:
        seen_S = seen_S & (s_S >= seq_len - WINDOW - first_key)
    return seen_S


@triton.jit
def _widened(q_MHp, k_SHp, v_SHp, FP8: tl.constexpr, UPCAST: tl.constexpr):
    """Queries, keys and values in the dtype of their products, which fp8 is not."""
    if FP8:
        q_MHp = to_fp16(q_MHp, UPCAST)
        k_SHp, v_SHp = (
            from_fp8(k_SHp, q_MHp.dtype, UPCAST),
            from_fp8_in_place(v_SHp, q_MHp.dtype, UPCAST),
        )
    return q_MHp, k_SHp, v_SHp


@triton.jit(do_not_specialize=["num_rows", "num_workers", "table_blocks", "table_stride"])
def decode_kernel(
    q_ptr,  # [R, N, H]
    k_ptr,  # [C, B, K, H]
    v_ptr,  # [C, B, K, H]
    table_ptr,  # [R, P] int32
    seq_len_ptr,  # [R] int32
    out_ptr,  # [R, N, H]
    part_out_ptr,  # [W, 2, K, G, H] fp32: results over a part of a row
    part_lse_ptr,  # [W, 2, K, G, H] fp32: log2 of the part's sum of 2^score, the same along H
    arrived_ptr,  # [W, K] int32: zero before and after each launch
    k_scale_ptr,  # [K] fp32, read for an fp8 cache
    v_scale_ptr,  # [K] fp32, read for an fp8 cache
    sinks_ptr,  # [N], None unless HAS_SINKS
    num_rows,
    num_workers,
    table_blocks,
    table_stride,
    scale_log2,
    # strides are constants, so a thread's addresses within a tile become immediate offsets
    Q_STRIDE_ROW: tl.constexpr,
    Q_STRIDE_HEAD: tl.constexpr,
    K_STRIDE_BLOCK: tl.constexpr,
    K_STRIDE_SLOT: tl.constexpr,
    K_STRIDE_HEAD: tl.constexpr,
    V_STRIDE_BLOCK: tl.constexpr,
    V_STRIDE_SLOT: tl.constexpr,
    V_STRIDE_HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP_P: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ROWS_P: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_WORKERS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL, EARLY=ROWS_P == 1)
    # neighbouring programs read the same tokens for different heads, which are adjacent in memory
    head_idx = tl.program_id(0) % NUM_KV_HEADS
    worker_idx = tl.program_id(0) // NUM_KV_HEADS

    # --- divide the work; every program computes the same division
    if ROWS_P == 1:
        seq_len = tl.load(seq_len_ptr)
        num_tiles = _num_tiles(seq_len, TILE, WINDOW)
    else:
        row_Rp = tl.arange(0, ROWS_P)
        seq_len_Rp = tl.load(seq_len_ptr + row_Rp, mask=row_Rp < num_rows, other=0)
        num_tiles_Rp = tl.where(row_Rp < num_rows, _num_tiles(seq_len_Rp, TILE, WINDOW), 0)
        tiles_end_Rp = tl.cumsum(num_tiles_Rp, 0)
        num_tiles = tl.sum(num_tiles_Rp, 0)
    # more workers read faster, but beyond this number the merge costs more than they save
    num_active = tl.minimum(
        tl.minimum(num_workers, num_tiles), tl.maximum(MIN_WORKERS, num_tiles // 4)
    )
    if worker_idx >= num_active:
        return
    tiles_per_worker = num_tiles // num_active
    num_long = num_tiles - tiles_per_worker * num_active
    span_begin = worker_idx * tiles_per_worker + tl.minimum(worker_idx, num_long)
    span_end = span_begin + tiles_per_worker + tl.where(worker_idx < num_long, 1, 0)
    if ROWS_P == 1:
        first_row, first_begin, first_end = 0, 0, num_tiles
    else:
        first_row = tl.sum(tl.where(tiles_end_Rp <= span_begin, 1, 0), 0)
        first_begin = tl.max(tl.where(tiles_end_Rp <= span_begin, tiles_end_Rp, 0), 0)
        first_end = tl.min(tl.where(tiles_end_Rp > span_begin, tiles_end_Rp, 0x7FFFFFFF), 0)
        seq_len = load_index(seq_len_ptr + first_row, UPCAST)

    # keys and values of an fp8 cache are used unscaled: the head's key scale multiplies the scores
    # and its value scale the result
    FP8: tl.constexpr = k_ptr.dtype.element_ty == tl.float8e4nv
    v_scale = 1.0
    if FP8:
        scale_log2 = scale_log2 * tl.load(k_scale_ptr + head_idx)
        v_scale = tl.load(v_scale_ptr + head_idx)

    SLOT: tl.constexpr = NUM_KV_HEADS * GROUP * HEAD
    group_M = tl.arange(0, GROUP_M)
    h_Hp = tl.arange(0, HEAD_P)
    s_S = tl.arange(0, TILE)
    q_head_M = head_idx * GROUP + group_M
    q_mask_MHp = (group_M < GROUP)[:, None] & (h_Hp < HEAD)[None, :]
    q_at_MHp = q_head_M[:, None] * Q_STRIDE_HEAD + h_Hp[None, :]
    out_at_MHp = q_head_M[:, None] * HEAD + h_Hp[None, :]
    part_at_MHp = worker_idx * (2 * SLOT) + out_at_MHp

    # --- loop over the span. row_begin and row_end: first and last tile (exclusive) of the current
    # row among all tiles.
    row_idx, row_begin, row_end = first_row, first_begin, first_end
    max_M = tl.full([GROUP_M], NO_SCORE, tl.float32)
    sum_M = tl.zeros([GROUP_M], tl.float32)
    acc_MHp = tl.zeros([GROUP_M, HEAD_P], tl.float32)
    for tile_idx in range(span_begin, span_end):
        first_key = (tile_idx - row_begin + _first_tile(seq_len, TILE, WINDOW)) * TILE
        seen_S = _seen_keys(s_S, first_key, seq_len, WINDOW)
        k_at_SHp, v_at_SHp = _tile_addresses(
            k_ptr, v_ptr, table_ptr + row_idx * table_stride, table_blocks, first_key, seen_S,
            head_idx, s_S, h_Hp, K_STRIDE_BLOCK, K_STRIDE_SLOT, K_STRIDE_HEAD, V_STRIDE_BLOCK,
            V_STRIDE_SLOT, V_STRIDE_HEAD, BLOCK, TILE, UPCAST,
        )  # fmt: skip
        # unseen keys are read as zeros: they may hold NaN, and 0 · NaN would reach the result
        mask_SHp = seen_S[:, None] & (h_Hp < HEAD)[None, :]
        q_MHp = tl.load(q_ptr + row_idx * Q_STRIDE_ROW + q_at_MHp, mask=q_mask_MHp, other=0.0)
        k_SHp = tl.load(k_at_SHp, mask=mask_SHp, other=0.0)
        v_SHp = tl.load(v_at_SHp, mask=mask_SHp, other=0.0)
        q_MHp, k_SHp, v_SHp = _widened(q_MHp, k_SHp, v_SHp, FP8, UPCAST)

        is_first = (tile_idx == row_begin) | (tile_idx == span_begin)
        is_last = (tile_idx + 1 == row_end) | (tile_idx + 1 == span_end)
        score_MS = dot(q_MHp, tl.trans(k_SHp), tl.zeros([GROUP_M, TILE], tl.float32), UPCAST)
        score_MS = tl.where(seen_S[None, :], score_MS, float("-inf"))
        max_M = tl.where(is_first, NO_SCORE, max_M)
        new_max_M = tl.maximum(max_M, tl.max(score_MS, 1) * scale_log2)
        alpha_M = tl.where(is_first, 0.0, exp2(max_M - new_max_M, UPCAST))
        prob_MS = exp2(score_MS * scale_log2 - new_max_M[:, None], UPCAST)
        sum_M = sum_M * alpha_M + tl.sum(prob_MS, 1)
        acc_MHp = dot(prob_MS.to(v_SHp.dtype), v_SHp, acc_MHp * alpha_M[:, None], UPCAST)
        max_M = new_max_M

        if is_last:
            store_result(
                acc_MHp, max_M, sum_M, v_scale, row_idx, row_begin, row_end, span_begin, span_end,
                out_ptr, part_out_ptr, part_lse_ptr, sinks_ptr, out_at_MHp, part_at_MHp, q_mask_MHp,
                q_head_M, SLOT, GROUP, GROUP_M, HEAD_P, FP8, HAS_SINKS,
            )  # fmt: skip

        if ROWS_P > 1:
            ends = tile_idx + 1 == row_end
            row_idx = tl.minimum(row_idx + ends.to(tl.int32), num_rows - 1)
            seq_len = load_index(seq_len_ptr + row_idx, UPCAST)
            row_begin = tl.where(ends, row_end, row_begin)
            row_end = tl.where(ends, row_end + _num_tiles(seq_len, TILE, WINDOW), row_end)

    # --- report the parts: of the row that began before the span, and of the row that ends after it
    continues = span_begin > first_begin
    unfinished = (row_begin >= span_begin) & (row_begin < span_end) & (row_end > span_end)
    for i in range(2):
        if (continues & (i == 0)) | (unfinished & (i == 1)):
            part_row = tl.where(i == 0, first_row, row_idx)
            part_row_begin = tl.where(i == 0, first_begin, row_begin)
            part_row_end = tl.where(i == 0, first_end, row_end)
            report_part(
                part_row, part_row_begin, part_row_end, num_long, tiles_per_worker, head_idx,
                arrived_ptr, part_out_ptr, part_lse_ptr, sinks_ptr, out_ptr,
                NUM_KV_HEADS, GROUP, GROUP_P, HEAD, HEAD_P, PARTS, HAS_SINKS,
            )  # fmt: skip


def paged_attention_decode(
    q_RNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    scale: float,
    window: int,
    launch: DecodeTile | None = None,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """softmax(q · kᵀ · scale) · v for the newest token of each row, as
    `reference.attention.paged_attention`.

    The scale must be positive. `launch` overrides the tile sizes, for measurements.
    """
    num_rows, num_heads, head_dim = q_RNH.shape
    block_size, num_kv_heads = k_cache_CBKH.shape[1:3]
    if scale <= 0:
        raise ValueError(f"attention scale must be positive, got {scale}")
    if q_RNH.stride(2) != 1:
        q_RNH = q_RNH.contiguous()
    out_RNH = torch.empty((num_rows, num_heads, head_dim), dtype=q_RNH.dtype, device=q_RNH.device)
    if num_rows == 0:
        return out_RNH
    device = q_RNH.device
    is_fp8 = k_cache_CBKH.dtype is torch.float8_e4m3fn and q_RNH.element_size() == 2
    # products of fp32 queries are in fp32, whatever the cache's dtype
    element_size = 1 if is_fp8 else q_RNH.element_size()
    head_bytes = triton.next_power_of_2(head_dim) * element_size
    launch = launch or decode_tile(
        head_bytes, block_size, num_rows, shared_memory_bytes(device), is_fp8
    )
    constants = decode_constants(
        num_heads, num_kv_heads, head_dim, block_size, num_rows, window, launch
    )
    max_tiles = num_rows * triton.cdiv(block_table_RP.shape[1] * block_size, launch.tile)
    num_workers = max(
        1, min(launch.programs * num_multiprocessors(device) // num_kv_heads, max_tiles)
    )
    part_out, part_lse = torch.empty(
        (2, num_workers * 2 * num_heads * head_dim), dtype=torch.float32, device=device
    )
    decode_kernel[(num_workers * num_kv_heads,)](
        q_RNH,
        k_cache_CBKH,
        v_cache_CBKH,
        block_table_RP,
        seq_len_R,
        out_RNH,
        part_out,
        part_lse,
        arrival_counters(device, num_workers * num_kv_heads),
        part_lse if k_scale_K is None else k_scale_K,
        part_lse if v_scale_K is None else v_scale_K,
        sinks_N,
        num_rows,
        num_workers,
        block_table_RP.shape[1],
        block_table_RP.stride(0),
        scale * LOG2_E,
        *q_RNH.stride()[:2],
        *k_cache_CBKH.stride()[:3],
        *v_cache_CBKH.stride()[:3],
        **constants,
        HAS_SINKS=sinks_N is not None,
        UPCAST=device.type != "cuda",
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(device),
    )
    return out_RNH
