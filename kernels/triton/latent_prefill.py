"""Attention over a paged cache of latents for several new tokens a row, in Triton.

A program takes a tile of queries: some tokens of a row, each with a tile of heads. It reads the
entries of the row up to its last query, once for all of them. As in `attention_prefill` the launch
depends on T and R only, and a program finds its row from q_start.

Shapes: T tokens | R rows | P blocks per row | C blocks in the cache | B block size in tokens | N
heads | L latent size | r rotated size | Z = L + r | M = tokens · heads entries of a query tile |
S entries of the cache in a tile; "p" after a letter: padded to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import (
    LOG2_E,
    NO_SCORE,
    launch_options,
    padded_rows,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)
from nanovllm.kernels.triton.latent_decode import (
    LatentTile,
    attend_entries,
    decode_tile,
    entries_at,
    latent_constants,
)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_blocks", "table_stride"])
def latent_prefill_kernel(
    q_ptr,  # [T, N, Z]
    cache_ptr,  # [C, B, Z]
    table_ptr,  # [R, P] int32
    seq_len_ptr,  # [R] int32
    q_start_ptr,  # [R + 1] int32
    out_ptr,  # [T, N, L]
    num_tokens,
    num_rows,
    table_blocks,
    table_stride,
    scale_log2,
    Q_STRIDE_TOKEN: tl.constexpr,
    Q_STRIDE_HEAD: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_P: tl.constexpr,
    ROTATED: tl.constexpr,
    ROTATED_P: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,  # entries of a query tile: QUERIES // HEADS tokens with HEADS heads
    TILE: tl.constexpr,
    ROWS_P: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    TOKENS: tl.constexpr = QUERIES // HEADS
    NUM_HEAD_TILES: tl.constexpr = NUM_HEADS // HEADS
    first_head = tl.program_id(0) % NUM_HEAD_TILES * HEADS
    # late tiles of a row see the most keys, so they start first and the last programs are short
    tile_idx = tl.num_programs(0) // NUM_HEAD_TILES - 1 - tl.program_id(0) // NUM_HEAD_TILES

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
    l_Lp, r_rp, s_S = tl.arange(0, LATENT_P), tl.arange(0, ROTATED_P), tl.arange(0, TILE)
    token_M = first_token + entry_M // HEADS
    head_M = first_head + entry_M % HEADS
    is_query_M = (entry_M < TOKENS * HEADS) & (token_M < end)
    token_M = token_M.to(tl.int64)  # T · N · Z may pass 2³¹
    mask_MLp = is_query_M[:, None] & (l_Lp < LATENT)[None, :]
    mask_Mrp = is_query_M[:, None] & (r_rp < ROTATED)[None, :]
    q_at_M1 = q_ptr + (token_M * Q_STRIDE_TOKEN + head_M * Q_STRIDE_HEAD)[:, None]
    q_MLp = tl.load(q_at_M1 + l_Lp[None, :], mask=mask_MLp, other=0.0)
    q_Mrp = tl.load(q_at_M1 + (LATENT + r_rp)[None, :], mask=mask_Mrp, other=0.0)
    max_M = tl.full([QUERIES], NO_SCORE, tl.float32)
    sum_M = tl.zeros([QUERIES], tl.float32)
    acc_MLp = tl.zeros([QUERIES, LATENT_P], tl.float32)

    # the query of token t is at position seq_len − (end − t); a row without keys has no tile
    first_pos = seq_len - end + first_token
    last_pos = tl.minimum(first_pos + TOKENS, seq_len) - 1
    query_pos_M = first_pos + entry_M // HEADS
    end_tile = tl.where(seq_len > 0, (tl.maximum(last_pos + 1, 0) + TILE - 1) // TILE, 0)
    # tokens of no row read nothing, but the pipeline loads a first block number for them
    table_at = table_ptr + tl.minimum(tl.maximum(row_idx, 0), num_rows - 1) * table_stride
    for tile in range(0, end_tile):
        first_key = tile * TILE
        seen_S = s_S < seq_len - first_key
        at_S = entries_at(
            cache_ptr, table_at, table_blocks, first_key, seen_S, s_S, STRIDE_BLOCK, STRIDE_SLOT,
            BLOCK, TILE, UPCAST,
        )  # fmt: skip
        seen_MS = (first_key + s_S)[None, :] <= query_pos_M[:, None]
        max_M, sum_M, acc_MLp = attend_entries(
            q_MLp, q_Mrp, at_S, seen_MS, seen_S, max_M, sum_M, acc_MLp, scale_log2, LATENT,
            LATENT_P, ROTATED, ROTATED_P, UPCAST,
        )  # fmt: skip
    out_MLp = acc_MLp / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
    out_at_MLp = ((token_M * NUM_HEADS + head_M) * LATENT)[:, None] + l_Lp[None, :]
    tl.store(out_ptr + out_at_MLp, out_MLp.to(out_ptr.dtype.element_ty), mask=mask_MLp)


def prefill_tile(num_heads: int, entry_bytes: int, is_fp32: bool, shared_bytes: int) -> LatentTile:
    """The launch: the heads of `latent_decode.decode_tile`, and 64 queries where they fit. The
    sizes are chosen to fit, and not measured."""
    launch = decode_tile(num_heads, entry_bytes, is_fp32, shared_bytes)
    if is_fp32 or shared_bytes < 160 * 1024:
        return launch
    return LatentTile(launch.heads, 32, 8, 3)


def num_queries(launch: LatentTile, max_q_len: int, is_fp32: bool, shared_bytes: int) -> int:
    """Entries of a query tile, a power of two: no more than a row has."""
    most = 16 if is_fp32 or shared_bytes < 160 * 1024 else 64
    of_row = int(triton.next_power_of_2(launch.heads * max_q_len))
    return max(16, int(triton.next_power_of_2(launch.heads)), min(most, of_row))


def latent_attention_prefill(
    q_TNZ: Tensor,
    cache_CBZ: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    latent_size: int,
) -> Tensor:
    """`reference.latent_attention.latent_attention` for several new tokens a row. The scale must be
    positive."""
    num_tokens, num_heads, entry_size = q_TNZ.shape
    num_rows = block_table_RP.shape[0]
    if scale <= 0:
        raise ValueError(f"attention scale must be positive, got {scale}")
    if q_TNZ.stride(2) != 1:
        q_TNZ = q_TNZ.contiguous()
    device = q_TNZ.device
    out_TNL = torch.empty((num_tokens, num_heads, latent_size), dtype=q_TNZ.dtype, device=device)
    if num_tokens == 0:
        return out_TNL
    is_fp32, shared_bytes = q_TNZ.element_size() == 4, shared_memory_bytes(device)
    sizes = latent_constants(num_heads, latent_size, entry_size - latent_size)
    entry_bytes = (sizes["LATENT_P"] + sizes["ROTATED_P"]) * q_TNZ.element_size()
    launch = prefill_tile(num_heads, entry_bytes, is_fp32, shared_bytes)
    queries = num_queries(launch, max_q_len, is_fp32, shared_bytes)
    num_tiles = num_tokens // (queries // launch.heads) + num_rows + 2
    latent_prefill_kernel[(num_tiles * (num_heads // launch.heads),)](
        q_TNZ,
        cache_CBZ,
        block_table_RP,
        seq_len_R,
        q_start_S,
        out_TNL,
        num_tokens,
        num_rows,
        block_table_RP.shape[1],
        block_table_RP.stride(0),
        scale * LOG2_E,
        *q_TNZ.stride()[:2],
        *cache_CBZ.stride()[:2],
        **sizes,
        **prefill_constants(launch, queries, cache_CBZ.shape[1], num_rows),
        UPCAST=device.type != "cuda",
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(device),
    )
    return out_TNL


def prefill_constants(
    launch: LatentTile, queries: int, block_size: int, num_rows: int
) -> dict[str, int]:
    """The constants of a launch."""
    return {
        "HEADS": launch.heads,
        "BLOCK": block_size,
        "QUERIES": queries,
        "TILE": launch.tile,
        "ROWS_P": padded_rows(num_rows),
    }
