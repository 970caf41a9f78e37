"""Paged attention for decode (one new token a row) in Triton, for sm_80 and newer.

The lengths of one batch differ by 20×, so neither rows nor fixed splits make equal work. Here the launch is static and
the division is made on the device: every key-value head has W workers (programs); the rows' keys, cut into tiles of
TILE tokens and laid end to end, are divided into W equal spans, and each worker walks its span with the online softmax
(stream-K, Osama et al. 2023, https://arxiv.org/abs/2301.03598; flash-decoding, Dao et al. 2023). A row that lies within
one span is written at once. A row cut by span borders leaves partial results; the last of its workers to arrive merges
them in the order of the spans, so the result depends on the lengths alone and not on timing.

Shapes: R rows | P blocks per row | C blocks in the cache | B block size in tokens | N query heads | K key-value heads
G = N / K query heads per key-value head | H head size | W workers per key-value head | S tokens in a tile
A name's suffix gives its shape; "p" after a letter: padded to a power of two.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton_common import (
    LOG2_E,
    NO_SCORE,
    dot,
    launch_options,
    num_multiprocessors,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)


@triton.jit
def _worker_of(tile_idx, num_long, tiles_per_worker):
    """The worker whose span holds a tile, where the first num_long workers have one tile more than the others."""
    long_tiles = num_long * (tiles_per_worker + 1)
    return tl.where(
        tile_idx < long_tiles,
        tile_idx // (tiles_per_worker + 1),
        num_long + (tile_idx - long_tiles) // tiles_per_worker,
    )


@triton.jit(do_not_specialize=["num_rows", "num_workers", "table_stride"])
def decode_kernel(
    q_ptr,  # [R, N, H]
    k_ptr,  # [C, B, K, H]
    v_ptr,  # [C, B, K, H]
    table_ptr,  # [R, P] int32
    seq_len_ptr,  # [R] int32
    out_ptr,  # [R, N, H]
    part_acc_ptr,  # [W, 2, K, G, H] fp32: weighted sums of values, not yet divided
    part_max_ptr,  # [W, 2, K, G] fp32: largest score (base 2)
    part_sum_ptr,  # [W, 2, K, G] fp32: sum of 2^(score − largest)
    arrived_ptr,  # [W, K] int32: zero before and after each launch
    num_rows,
    num_workers,
    table_stride,
    scale_log2,
    q_stride_row,
    q_stride_head,
    k_stride_block,
    k_stride_slot,
    k_stride_head,
    v_stride_block,
    v_stride_slot,
    v_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_M: tl.constexpr,  # G padded to what the matrix units need (16)
    GROUP_P: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ROWS_P: tl.constexpr,
    PARTS: tl.constexpr,  # partial results merged at a time
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    # neighbouring programs read the same tokens for different heads: together they read whole cache lines of DRAM pages
    head_idx = tl.program_id(0) % NUM_KV_HEADS
    worker_idx = tl.program_id(0) // NUM_KV_HEADS

    # --- divide the work: every program does the same small sums
    row_Rp = tl.arange(0, ROWS_P)
    seq_len_Rp = tl.load(seq_len_ptr + row_Rp, mask=row_Rp < num_rows, other=0)
    num_tiles_Rp = (seq_len_Rp + TILE - 1) // TILE
    if WINDOW > 0:
        num_tiles_Rp -= tl.maximum(seq_len_Rp - WINDOW, 0) // TILE
    # an empty row gets one masked tile, whose result is the zeros it has to give
    num_tiles_Rp = tl.where(row_Rp < num_rows, tl.maximum(num_tiles_Rp, 1), 0)
    tiles_end_Rp = tl.cumsum(num_tiles_Rp, 0)
    num_tiles = tl.sum(num_tiles_Rp, 0)
    num_active = tl.minimum(num_workers, num_tiles)
    if worker_idx >= num_active:
        return
    tiles_per_worker = num_tiles // num_active
    num_long = num_tiles - tiles_per_worker * num_active
    span_begin = worker_idx * tiles_per_worker + tl.minimum(worker_idx, num_long)
    span_end = span_begin + tiles_per_worker + tl.where(worker_idx < num_long, 1, 0)
    first_row = tl.sum(tl.where(tiles_end_Rp <= span_begin, 1, 0), 0)
    last_row = tl.sum(tl.where(tiles_end_Rp < span_end, 1, 0), 0)
    row_begin = tl.sum(tl.where(row_Rp < first_row, num_tiles_Rp, 0), 0)

    group_M = tl.arange(0, GROUP_M)
    h_Hp = tl.arange(0, HEAD_P)
    s_S = tl.arange(0, TILE)
    q_mask_MHp = (group_M < GROUP)[:, None] & (h_Hp < HEAD)[None, :]
    q_head_M = head_idx * GROUP + group_M

    for row_idx in range(first_row, last_row + 1):
        seq_len = tl.load(seq_len_ptr + row_idx)
        first_tile = 0
        window_begin = 0
        if WINDOW > 0:
            window_begin = tl.maximum(seq_len - WINDOW, 0)
            first_tile = window_begin // TILE
        row_end = row_begin + tl.maximum((seq_len + TILE - 1) // TILE - first_tile, 1)
        begin = tl.maximum(row_begin, span_begin)
        end = tl.minimum(row_end, span_end)
        table_at = table_ptr + row_idx * table_stride

        q_at_MHp = row_idx * q_stride_row + q_head_M[:, None] * q_stride_head + h_Hp[None, :]
        q_MHp = tl.load(q_ptr + q_at_MHp, mask=q_mask_MHp, other=0.0)
        max_M = tl.full([GROUP_M], NO_SCORE, tl.float32)
        sum_M = tl.zeros([GROUP_M], tl.float32)
        acc_MHp = tl.zeros([GROUP_M, HEAD_P], tl.float32)
        for tile_idx in range(begin - row_begin + first_tile, end - row_begin + first_tile):
            key_S = tile_idx * TILE + s_S
            seen_S = key_S < seq_len
            if WINDOW > 0:
                seen_S = seen_S & (key_S >= window_begin)
            if BLOCK % TILE == 0:
                block = tl.load(table_at + tile_idx * TILE // BLOCK, mask=seq_len > 0, other=0)
                slot_S = tile_idx * TILE % BLOCK + s_S
                k_S = k_ptr + block.to(tl.int64) * k_stride_block + slot_S * k_stride_slot
                v_S = v_ptr + block.to(tl.int64) * v_stride_block + slot_S * v_stride_slot
            else:
                block_S = tl.load(table_at + key_S // BLOCK, mask=seen_S, other=0).to(tl.int64)
                k_S = k_ptr + block_S * k_stride_block + (key_S % BLOCK) * k_stride_slot
                v_S = v_ptr + block_S * v_stride_block + (key_S % BLOCK) * v_stride_slot
            # keys not seen are read as zeros: whatever lies there, NaN included, must not reach 0 · v
            mask_SHp = seen_S[:, None] & (h_Hp < HEAD)[None, :]
            k_SHp = tl.load(k_S[:, None] + head_idx * k_stride_head + h_Hp[None, :], mask=mask_SHp, other=0.0)
            v_SHp = tl.load(v_S[:, None] + head_idx * v_stride_head + h_Hp[None, :], mask=mask_SHp, other=0.0)
            score_MS = dot(q_MHp, tl.trans(k_SHp), tl.zeros([GROUP_M, TILE], tl.float32), UPCAST) * scale_log2
            score_MS = tl.where(seen_S[None, :], score_MS, float("-inf"))
            new_max_M = tl.maximum(max_M, tl.max(score_MS, 1))
            alpha_M = tl.exp2(max_M - new_max_M)
            prob_MS = tl.exp2(score_MS - new_max_M[:, None])
            sum_M = sum_M * alpha_M + tl.sum(prob_MS, 1)
            acc_MHp = dot(prob_MS.to(v_SHp.dtype), v_SHp, acc_MHp * alpha_M[:, None], UPCAST)
            max_M = new_max_M

        if (begin == row_begin) & (end == row_end):
            out_MHp = acc_MHp / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
            out_at = (row_idx * NUM_KV_HEADS * GROUP + q_head_M[:, None]) * HEAD + h_Hp[None, :]
            tl.store(out_ptr + out_at, out_MHp.to(out_ptr.dtype.element_ty), mask=q_mask_MHp)
        else:
            # slot 1 holds the head of a row (at most one a worker), slot 0 the continuation of one
            slot = tl.where(begin == row_begin, 1, 0)
            part_M = ((worker_idx * 2 + slot) * NUM_KV_HEADS + head_idx) * GROUP + group_M
            tl.store(part_max_ptr + part_M, max_M, mask=group_M < GROUP)
            tl.store(part_sum_ptr + part_M, sum_M, mask=group_M < GROUP)
            tl.store(part_acc_ptr + part_M[:, None] * HEAD + h_Hp[None, :], acc_MHp, mask=q_mask_MHp)
            first_worker = _worker_of(row_begin, num_long, tiles_per_worker)
            num_parts = _worker_of(row_end - 1, num_long, tiles_per_worker) - first_worker + 1
            # all threads' stores come before the one thread's release; its acquire comes before all threads' loads
            tl.debug_barrier()
            arrived_at = arrived_ptr + first_worker * NUM_KV_HEADS + head_idx
            num_before = tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu")
            if num_before == num_parts - 1:
                tl.store(arrived_at, 0)
                group_Gp = tl.arange(0, GROUP_P)
                all_max_Gp = tl.full([GROUP_P], NO_SCORE, tl.float32)
                all_sum_Gp = tl.zeros([GROUP_P], tl.float32)
                all_acc_GpHp = tl.zeros([GROUP_P, HEAD_P], tl.float32)
                for first_part in range(0, num_parts, PARTS):
                    part_A = first_part + tl.arange(0, PARTS)
                    slot_A = (first_worker + part_A) * 2 + tl.where(part_A == 0, 1, 0)
                    at_AGp = ((slot_A * NUM_KV_HEADS + head_idx) * GROUP)[:, None] + group_Gp[None, :]
                    mask_AGp = (part_A < num_parts)[:, None] & (group_Gp < GROUP)[None, :]
                    at_AGpHp = at_AGp[:, :, None] * HEAD + h_Hp[None, None, :]
                    mask_AGpHp = mask_AGp[:, :, None] & (h_Hp < HEAD)[None, None, :]
                    # .cg: other multiprocessors wrote these, so L1 is not asked
                    max_AGp = tl.load(part_max_ptr + at_AGp, mask=mask_AGp, other=NO_SCORE, cache_modifier=".cg")
                    sum_AGp = tl.load(part_sum_ptr + at_AGp, mask=mask_AGp, other=0.0, cache_modifier=".cg")
                    acc_AGpHp = tl.load(part_acc_ptr + at_AGpHp, mask=mask_AGpHp, other=0.0, cache_modifier=".cg")
                    new_max_Gp = tl.maximum(all_max_Gp, tl.max(max_AGp, 0))
                    alpha_Gp = tl.exp2(all_max_Gp - new_max_Gp)
                    weight_AGp = tl.exp2(max_AGp - new_max_Gp[None, :])
                    all_sum_Gp = all_sum_Gp * alpha_Gp + tl.sum(sum_AGp * weight_AGp, 0)
                    all_acc_GpHp = all_acc_GpHp * alpha_Gp[:, None] + tl.sum(acc_AGpHp * weight_AGp[:, :, None], 0)
                    all_max_Gp = new_max_Gp
                out_GpHp = all_acc_GpHp / tl.where(all_sum_Gp > 0, all_sum_Gp, 1.0)[:, None]
                out_at = (row_idx * NUM_KV_HEADS * GROUP + head_idx * GROUP + group_Gp)[:, None] * HEAD + h_Hp[None, :]
                out_mask = (group_Gp < GROUP)[:, None] & (h_Hp < HEAD)[None, :]
                tl.store(out_ptr + out_at, out_GpHp.to(out_ptr.dtype.element_ty), mask=out_mask)
        row_begin = row_end


# The arrival counters have to be zero before a launch and are left zero by it, so they outlive the calls: a fill in front
# of each launch would cost as much as the launch. Launches that share counters must not run at the same time, so every
# stream gets its own (the stream of the capture, for a graph: give engines that run side by side a stream each).
_MAX_STREAMS = 128
_COUNTERS_PER_STREAM = 4096
_counters: dict[torch.device, Tensor] = {}
_stream_slots: dict[tuple[torch.device, int], int] = {}


def _arrival_counters(device: torch.device, num_counters: int) -> Tensor:
    """Zeroed int32 counters that belong to the current stream of the device."""
    if device.type != "cuda":
        return torch.zeros(num_counters, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _counters and not capturing:
        _counters[device] = torch.zeros(_MAX_STREAMS, _COUNTERS_PER_STREAM, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # once a process: other streams may use them next
    stream = (device, torch.cuda.current_stream(device).cuda_stream)
    slot = _stream_slots.setdefault(stream, len(_stream_slots))
    if device not in _counters or slot >= _MAX_STREAMS or num_counters > _COUNTERS_PER_STREAM:
        # right as well, but a fill in front of every launch and replay
        return torch.zeros(num_counters, dtype=torch.int32, device=device)
    return _counters[device][slot]


class DecodeTile(NamedTuple):
    """How a decode launch is cut."""

    tile: int  # tokens in a tile of keys
    num_warps: int
    num_stages: int
    programs: int  # programs per multiprocessor
    merge_elements: int = 2048  # fp32 elements of partial results read at a time


def decode_tile(head_bytes: int, shared_bytes: int) -> DecodeTile:
    """The launch for heads of head_bytes (padded to a power of two).

    A tile of keys is 16 KB: the two programs on a multiprocessor keep 128 KB in flight, more than the 33 KB that
    bandwidth times latency asks for. Half the tile where shared memory is 99 KB (sm_86, sm_89).
    """
    tile_bytes = 16384 if shared_bytes >= 160 * 1024 else 8192
    return DecodeTile(min(64, max(16, tile_bytes // head_bytes)), 4, 5, 2)


def decode_constants(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, num_rows: int, window: int, launch: DecodeTile
) -> dict[str, int]:
    """The kernel's compile-time constants; few values of ROWS_P, so that batch buckets share compiled kernels."""
    group = num_heads // num_kv_heads
    group_p, head_p = triton.next_power_of_2(group), triton.next_power_of_2(head_dim)
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "GROUP_M": max(16, group_p),
        "GROUP_P": group_p,
        "HEAD": head_dim,
        "HEAD_P": head_p,
        "BLOCK": block_size,
        "TILE": launch.tile,
        "ROWS_P": next((rows for rows in (16, 64, 256) if num_rows <= rows), triton.next_power_of_2(num_rows)),
        "PARTS": max(2, min(32, launch.merge_elements // (group_p * head_p))),
        "WINDOW": max(0, window),
    }


def paged_attention_decode(
    q_RNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    scale: float,
    window: int,
    launch: DecodeTile | None = None,
) -> Tensor:
    """softmax(q · kᵀ · scale) · v for the one newest token of each row; see `reference.paged_attention`.

    `launch` overrides the choice of tiles, for measurements.
    """
    num_rows, num_heads, head_dim = q_RNH.shape
    block_size, num_kv_heads = k_cache_CBKH.shape[1:3]
    if q_RNH.stride(2) != 1:
        q_RNH = q_RNH.contiguous()
    out_RNH = torch.empty((num_rows, num_heads, head_dim), dtype=q_RNH.dtype, device=q_RNH.device)
    if num_rows == 0:
        return out_RNH
    device = q_RNH.device
    head_bytes = triton.next_power_of_2(head_dim) * k_cache_CBKH.element_size()
    launch = launch or decode_tile(head_bytes, shared_memory_bytes(device))
    constants = decode_constants(num_heads, num_kv_heads, head_dim, block_size, num_rows, window, launch)
    max_tiles = num_rows * triton.cdiv(block_table_RP.shape[1] * block_size, launch.tile)
    num_workers = max(1, min(launch.programs * num_multiprocessors(device) // num_kv_heads, max_tiles))
    group = constants["GROUP"]
    part_acc = torch.empty(num_workers * 2 * num_kv_heads * group * head_dim, dtype=torch.float32, device=device)
    part_max, part_sum = torch.empty((2, num_workers * 2 * num_kv_heads * group), dtype=torch.float32, device=device)
    decode_kernel[(num_workers * num_kv_heads,)](
        q_RNH,
        k_cache_CBKH,
        v_cache_CBKH,
        block_table_RP,
        seq_len_R,
        out_RNH,
        part_acc,
        part_max,
        part_sum,
        _arrival_counters(device, num_workers * num_kv_heads),
        num_rows,
        num_workers,
        block_table_RP.stride(0),
        scale * LOG2_E,
        q_RNH.stride(0),
        q_RNH.stride(1),
        k_cache_CBKH.stride(0),
        k_cache_CBKH.stride(1),
        k_cache_CBKH.stride(2),
        v_cache_CBKH.stride(0),
        v_cache_CBKH.stride(1),
        v_cache_CBKH.stride(2),
        **constants,
        UPCAST=device.type != "cuda",
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(device),
    )
    return out_RNH
