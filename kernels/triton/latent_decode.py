"""Attention over a paged cache of latents for decode (one new token a row) in Triton.

All heads read the same entries, so a program multiplies a tile of entries, loaded once, by the
queries of a tile of heads: as keys, and then, without the rotated part, as values. The time is that
of the entries' bytes for up to a tile of heads.

As in `attention_decode`, W workers share the tiles of all rows evenly, whatever the rows' lengths.
A row within one worker's span is written directly. Otherwise each of its workers leaves a part, and
a second kernel merges the parts of a row: a program for each row and head, since a result has L
numbers a head.

Shapes: R rows | P blocks per row | C blocks in the cache | B block size in tokens | N heads | M
heads of a tile, padded for the matrix units | L latent size | r rotated size | Z = L + r | S
tokens in a tile | W workers per tile of heads; "p" after a letter: padded to a power of two
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
    launch_options,
    load_index,
    num_multiprocessors,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)


@triton.jit
def entries_at(cache_ptr, table_at, table_blocks, first_key, seen_S, s_S,
               STRIDE_BLOCK: tl.constexpr, STRIDE_SLOT: tl.constexpr, BLOCK: tl.constexpr,
               TILE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Where the entries of a tile begin, [S]."""
    if BLOCK % TILE == 0:
        # the pipeline also loads block numbers of tiles beyond the last
        block_idx = tl.minimum(first_key // BLOCK, table_blocks - 1)
        block = load_index(table_at + block_idx, UPCAST).to(tl.int64)
        return cache_ptr + block * STRIDE_BLOCK + (first_key % BLOCK + s_S) * STRIDE_SLOT
    else:
        key_S = first_key + s_S
        block_S = tl.load(table_at + key_S // BLOCK, mask=seen_S, other=0).to(tl.int64)
        return cache_ptr + block_S * STRIDE_BLOCK + (key_S % BLOCK) * STRIDE_SLOT


@triton.jit
def attend_entries(q_MLp, q_Mrp, at_S, seen_MS, seen_S, max_M, sum_M, acc_MLp, scale_log2,
                   LATENT: tl.constexpr, LATENT_P: tl.constexpr, ROTATED: tl.constexpr,
                   ROTATED_P: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Adds a tile of entries to the online softmax. The entries that no query sees are read as
    zeros: they may hold NaN, and 0 · NaN would reach the result."""
    l_Lp, r_rp = tl.arange(0, LATENT_P), tl.arange(0, ROTATED_P)
    c_SLp = tl.load(
        at_S[:, None] + l_Lp[None, :], mask=seen_S[:, None] & (l_Lp < LATENT)[None, :], other=0.0
    )
    k_Srp = tl.load(
        at_S[:, None] + (LATENT + r_rp)[None, :],
        mask=seen_S[:, None] & (r_rp < ROTATED)[None, :],
        other=0.0,
    )
    score_MS = dot(q_Mrp, tl.trans(k_Srp), tl.zeros(seen_MS.shape, tl.float32), UPCAST)
    score_MS = dot(q_MLp, tl.trans(c_SLp), score_MS, UPCAST)
    score_MS = tl.where(seen_MS, score_MS, float("-inf"))
    new_max_M = tl.maximum(max_M, tl.max(score_MS, 1) * scale_log2)
    alpha_M = exp2(max_M - new_max_M, UPCAST)
    prob_MS = exp2(score_MS * scale_log2 - new_max_M[:, None], UPCAST)
    sum_M = sum_M * alpha_M + tl.sum(prob_MS, 1)
    acc_MLp = dot(prob_MS.to(c_SLp.dtype), c_SLp, acc_MLp * alpha_M[:, None], UPCAST)
    return new_max_M, sum_M, acc_MLp


@triton.jit
def _num_tiles(seq_len, TILE: tl.constexpr):
    """Tiles of a row. An empty row has one tile, all masked, so that its result is zeros."""
    return tl.maximum((seq_len + TILE - 1) // TILE, 1)


@triton.jit
def _divide(num_tiles, num_workers, MIN_WORKERS: tl.constexpr):
    """(active workers, tiles of each, how many of the first have one more)."""
    # more workers read faster, but beyond this number the merge costs more than they save
    num_active = tl.minimum(num_workers, num_tiles)
    num_active = tl.minimum(num_active, tl.maximum(MIN_WORKERS, num_tiles // 2))
    each = num_tiles // num_active
    return num_active, each, num_tiles - each * num_active


@triton.jit
def _worker_of(tile_idx, each, num_long):
    """The worker whose span holds a tile."""
    long_tiles = num_long * (each + 1)
    return tl.where(
        tile_idx < long_tiles, tile_idx // (each + 1), num_long + (tile_idx - long_tiles) // each
    )


@triton.jit
def _tiles_before(seq_len_ptr, row_idx, num_rows, TILE: tl.constexpr, ROWS_P: tl.constexpr):
    """(tiles of the rows before a row, tiles of all rows)."""
    row_Rp = tl.arange(0, ROWS_P)
    seq_len_Rp = tl.load(seq_len_ptr + row_Rp, mask=row_Rp < num_rows, other=0)
    num_Rp = tl.where(row_Rp < num_rows, _num_tiles(seq_len_Rp, TILE), 0)
    return tl.sum(tl.where(row_Rp < row_idx, num_Rp, 0), 0), tl.sum(num_Rp, 0)


@triton.jit(do_not_specialize=["num_rows", "num_workers", "table_blocks", "table_stride"])
def latent_decode_kernel(
    q_ptr,  # [R, N, Z]
    cache_ptr,  # [C, B, Z]
    table_ptr,  # [R, P] int32
    seq_len_ptr,  # [R] int32
    out_ptr,  # [R, N, L]
    part_out_ptr,  # [W, 2, N, L] fp32: results over a part of a row
    part_lse_ptr,  # [W, 2, N] fp32: log2 of the part's sum of 2^score
    num_rows,
    num_workers,
    table_blocks,
    table_stride,
    scale_log2,
    Q_STRIDE_ROW: tl.constexpr,
    Q_STRIDE_HEAD: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_M: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_P: tl.constexpr,
    ROTATED: tl.constexpr,
    ROTATED_P: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ROWS_P: tl.constexpr,
    MIN_WORKERS: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    # neighbouring programs read the same entries for different heads
    first_head = tl.program_id(0) % (NUM_HEADS // HEADS) * HEADS
    worker_idx = tl.program_id(0) // (NUM_HEADS // HEADS)

    # --- divide the work; every program computes the same division
    row_Rp = tl.arange(0, ROWS_P)
    seq_len_Rp = tl.load(seq_len_ptr + row_Rp, mask=row_Rp < num_rows, other=0)
    num_Rp = tl.where(row_Rp < num_rows, _num_tiles(seq_len_Rp, TILE), 0)
    end_Rp = tl.cumsum(num_Rp, 0)
    num_active, each, num_long = _divide(tl.sum(num_Rp, 0), num_workers, MIN_WORKERS)
    if worker_idx >= num_active:
        return
    span_begin = worker_idx * each + tl.minimum(worker_idx, num_long)
    span_end = span_begin + each + tl.where(worker_idx < num_long, 1, 0)
    row_idx = tl.sum(tl.where(end_Rp <= span_begin, 1, 0), 0)
    row_begin = tl.max(tl.where(end_Rp <= span_begin, end_Rp, 0), 0)

    head_M = tl.arange(0, HEADS_M)
    l_Lp, r_rp, s_S = tl.arange(0, LATENT_P), tl.arange(0, ROTATED_P), tl.arange(0, TILE)
    is_head_M = head_M < HEADS
    mask_MLp = is_head_M[:, None] & (l_Lp < LATENT)[None, :]
    mask_Mrp = is_head_M[:, None] & (r_rp < ROTATED)[None, :]
    head_M += first_head
    tile_idx = span_begin
    while tile_idx < span_end:
        seq_len = tl.load(seq_len_ptr + row_idx)
        row_end = row_begin + _num_tiles(seq_len, TILE)
        end = tl.minimum(row_end, span_end)
        q_at_M1 = q_ptr + row_idx.to(tl.int64) * Q_STRIDE_ROW + (head_M * Q_STRIDE_HEAD)[:, None]
        q_MLp = tl.load(q_at_M1 + l_Lp[None, :], mask=mask_MLp, other=0.0)
        q_Mrp = tl.load(q_at_M1 + (LATENT + r_rp)[None, :], mask=mask_Mrp, other=0.0)
        max_M = tl.full([HEADS_M], NO_SCORE, tl.float32)
        sum_M = tl.zeros([HEADS_M], tl.float32)
        acc_MLp = tl.zeros([HEADS_M, LATENT_P], tl.float32)
        table_at = table_ptr + row_idx * table_stride
        for tile in range(tile_idx - row_begin, end - row_begin):
            first_key = tile * TILE
            seen_S = s_S < seq_len - first_key
            at_S = entries_at(
                cache_ptr, table_at, table_blocks, first_key, seen_S, s_S, STRIDE_BLOCK,
                STRIDE_SLOT, BLOCK, TILE, UPCAST,
            )  # fmt: skip
            seen_MS = tl.broadcast_to(seen_S[None, :], [HEADS_M, TILE])
            max_M, sum_M, acc_MLp = attend_entries(
                q_MLp, q_Mrp, at_S, seen_MS, seen_S, max_M, sum_M, acc_MLp, scale_log2, LATENT,
                LATENT_P, ROTATED, ROTATED_P, UPCAST,
            )  # fmt: skip
        safe_sum_M = tl.where(sum_M > 0, sum_M, 1.0)
        acc_MLp = acc_MLp / safe_sum_M[:, None]
        at_MLp = head_M[:, None] * LATENT + l_Lp[None, :]
        if (tile_idx == row_begin) & (end == row_end):
            out_at = out_ptr + row_idx.to(tl.int64) * (NUM_HEADS * LATENT) + at_MLp
            tl.store(out_at, acc_MLp.to(out_ptr.dtype.element_ty), mask=mask_MLp)
        else:
            # part 1 holds the beginning of a row (at most one a worker), part 0 its continuation
            part = worker_idx * 2 + tl.where(tile_idx == row_begin, 1, 0)
            lse_M = max_M + tl.log2(safe_sum_M)
            tl.store(part_lse_ptr + part * NUM_HEADS + head_M, lse_M, mask=is_head_M)
            part_at = part_out_ptr + part.to(tl.int64) * (NUM_HEADS * LATENT) + at_MLp
            tl.store(part_at, acc_MLp, mask=mask_MLp)
        tile_idx = end
        row_begin = row_end
        row_idx += 1


@triton.jit(do_not_specialize=["num_rows", "num_workers"])
def latent_merge_kernel(
    seq_len_ptr,  # [R] int32
    part_out_ptr,  # [W, 2, N, L] fp32
    part_lse_ptr,  # [W, 2, N] fp32
    out_ptr,  # [R, N, L], written for rows of several workers
    num_rows,
    num_workers,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_P: tl.constexpr,
    TILE: tl.constexpr,
    ROWS_P: tl.constexpr,
    MIN_WORKERS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = Σ 2^lse_i · out_i / Σ 2^lse_i over the parts, PARTS of which are loaded at a time."""
    wait_for_earlier_kernels(PDL)
    row_idx, head_idx = tl.program_id(0), tl.program_id(1)
    row_begin, num_tiles = _tiles_before(seq_len_ptr, row_idx, num_rows, TILE, ROWS_P)
    _, each, num_long = _divide(num_tiles, num_workers, MIN_WORKERS)
    row_end = row_begin + _num_tiles(tl.load(seq_len_ptr + row_idx), TILE)
    first = _worker_of(row_begin, each, num_long)
    num_parts = _worker_of(row_end - 1, each, num_long) - first + 1
    if num_parts == 1:
        return
    l_Lp, part_Q = tl.arange(0, LATENT_P), tl.arange(0, PARTS)
    mask_Lp = l_Lp < LATENT
    largest = NO_SCORE
    total = 0.0
    acc_Lp = tl.zeros([LATENT_P], tl.float32)
    for first_part in range(0, num_parts, PARTS):
        is_part_Q = first_part + part_Q < num_parts
        # the first part begins the row (part 1 of its worker), the others continue it (part 0)
        at_Q = (first + first_part + part_Q) * 2 + tl.where(first_part + part_Q == 0, 1, 0)
        at_Q = at_Q.to(tl.int64) * NUM_HEADS + head_idx
        lse_Q = tl.load(part_lse_ptr + at_Q, mask=is_part_Q, other=NO_SCORE)
        out_QLp = tl.load(
            part_out_ptr + at_Q[:, None] * LATENT + l_Lp[None, :],
            mask=is_part_Q[:, None] & mask_Lp[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(lse_Q, 0))
        alpha = tl.exp2(largest - new_largest)
        weight_Q = tl.where(is_part_Q, tl.exp2(lse_Q - new_largest), 0.0)
        total = total * alpha + tl.sum(weight_Q, 0)
        acc_Lp = acc_Lp * alpha + tl.sum(out_QLp * weight_Q[:, None], 0)
        largest = new_largest
    at = (row_idx.to(tl.int64) * NUM_HEADS + head_idx) * LATENT
    tl.store(out_ptr + at + l_Lp, (acc_Lp / total).to(out_ptr.dtype.element_ty), mask=mask_Lp)


class LatentTile(NamedTuple):
    """Tile sizes and launch options of a launch."""

    heads: int  # heads of a tile, or queries times heads
    tile: int  # entries in a tile
    num_warps: int
    num_stages: int


def head_tile(num_heads: int, most: int) -> int:
    """The largest divisor of the number of heads up to `most`."""
    return max(num for num in range(1, min(num_heads, most) + 1) if num_heads % num == 0)


def decode_tile(num_heads: int, entry_bytes: int, is_fp32: bool, shared_bytes: int) -> LatentTile:
    """The launch for entries of `entry_bytes` (padded).

    Shared memory holds the queries of a tile and the tiles of entries that are on their way. The
    sizes are chosen to fit, and not measured.
    """
    if is_fp32:  # without matrix units: small tiles stay within the registers
        return LatentTile(head_tile(num_heads, 16), 16, 8, 1)
    if shared_bytes < 160 * 1024:
        return LatentTile(head_tile(num_heads, 16), 16, 4, 1 if shared_bytes < 96 * 1024 else 2)
    heads = head_tile(num_heads, 64)
    if heads > 32:
        return LatentTile(heads, 32, 8, 3 if shared_bytes >= 200 * 1024 else 2)
    is_large = shared_bytes >= 200 * 1024 and entry_bytes <= 1280
    return LatentTile(heads, 64 if is_large else 32, 4 if heads <= 16 else 8, 3)


def latent_constants(num_heads: int, latent_size: int, rotated_size: int) -> dict[str, int]:
    """The constants of both kernels for sizes of a model. The matrix units take 16 at least."""
    return {
        "NUM_HEADS": num_heads,
        "LATENT": latent_size,
        "LATENT_P": max(16, triton.next_power_of_2(latent_size)),
        "ROTATED": rotated_size,
        "ROTATED_P": max(16, triton.next_power_of_2(rotated_size)),
    }


def decode_constants(launch: LatentTile, block_size: int, num_rows: int) -> dict[str, int]:
    """The constants of a launch. ROWS_P has few values, so buckets share kernels."""
    return {
        "HEADS": launch.heads,
        "HEADS_M": max(16, triton.next_power_of_2(launch.heads)),
        "BLOCK": block_size,
        "TILE": launch.tile,
        "ROWS_P": next(
            (rows for rows in (16, 64, 256) if num_rows <= rows), triton.next_power_of_2(num_rows)
        ),
        "MIN_WORKERS": 16,
        "PARTS": 4,
    }


def latent_attention_decode(
    q_RNZ: Tensor,
    cache_CBZ: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    scale: float,
    latent_size: int,
    launch: LatentTile | None = None,
) -> Tensor:
    """`reference.latent_attention.latent_attention` for the newest token of each row.

    The scale must be positive. `launch` overrides the tile sizes, for measurements.
    """
    num_rows, num_heads, entry_size = q_RNZ.shape
    if scale <= 0:
        raise ValueError(f"attention scale must be positive, got {scale}")
    if q_RNZ.stride(2) != 1:
        q_RNZ = q_RNZ.contiguous()
    device = q_RNZ.device
    out_RNL = torch.empty((num_rows, num_heads, latent_size), dtype=q_RNZ.dtype, device=device)
    if num_rows == 0:
        return out_RNL
    block_size, element_size = cache_CBZ.shape[1], q_RNZ.element_size()
    sizes = latent_constants(num_heads, latent_size, entry_size - latent_size)
    entry_bytes = (sizes["LATENT_P"] + sizes["ROTATED_P"]) * element_size
    launch = launch or decode_tile(
        num_heads, entry_bytes, element_size == 4, shared_memory_bytes(device)
    )
    constants = sizes | decode_constants(launch, block_size, num_rows)
    num_head_tiles = num_heads // launch.heads
    max_tiles = num_rows * triton.cdiv(block_table_RP.shape[1] * block_size, launch.tile)
    num_workers = max(1, min(num_multiprocessors(device) // num_head_tiles, max_tiles))
    part_out = torch.empty(
        (num_workers * 2, num_heads, latent_size), dtype=torch.float32, device=device
    )
    part_lse = torch.empty((num_workers * 2, num_heads), dtype=torch.float32, device=device)
    of_merge = ("NUM_HEADS", "LATENT", "LATENT_P", "TILE", "ROWS_P", "MIN_WORKERS", "PARTS")
    latent_decode_kernel[(num_workers * num_head_tiles,)](
        q_RNZ,
        cache_CBZ,
        block_table_RP,
        seq_len_R,
        out_RNL,
        part_out,
        part_lse,
        num_rows,
        num_workers,
        block_table_RP.shape[1],
        block_table_RP.stride(0),
        scale * LOG2_E,
        *q_RNZ.stride()[:2],
        *cache_CBZ.stride()[:2],
        **{name: value for name, value in constants.items() if name != "PARTS"},
        UPCAST=device.type != "cuda",
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(device),
    )
    if num_workers > 1:
        latent_merge_kernel[(num_rows, num_heads)](
            seq_len_R,
            part_out,
            part_lse,
            out_RNL,
            num_rows,
            num_workers,
            **{name: constants[name] for name in of_merge},
            num_warps=4,
            **launch_options(device),
        )
    return out_RNL
