"""Tile sizes and constants of decode attention (`attention_decode.py`)."""

from typing import NamedTuple

import triton


class DecodeTile(NamedTuple):
    """Tile sizes and launch options of a decode launch."""

    tile: int  # tokens in a tile of keys
    num_warps: int
    num_stages: int
    programs: int  # programs per multiprocessor
    max_parts: int  # most parts of a row that the merge loads at a time


def decode_tile(
    head_bytes: int, block_size: int, num_rows: int, shared_bytes: int, is_fp8: bool = False
) -> DecodeTile:
    """The launch for heads of head_bytes (padded to a power of two).

    Two programs on a multiprocessor, each with two tiles of 16 KB of keys and two of values, keep
    128 KB in flight; bandwidth times latency needs about 40 KB. With shared memory of 99 KB (sm_86,
    sm_89) tiles are half as large. Tiles of an fp8 cache have the same bytes, so twice the tokens
    if its blocks hold them. The fp8 tiles are not measured.
    """
    most = 128 if is_fp8 and block_size % 128 == 0 else 64
    tile = min(most, max(16, (16384 if shared_bytes >= 160 * 1024 else 8192) // head_bytes))
    single = num_rows == 1 and block_size % tile == 0
    # a tile in flight holds keys, values and queries; the result on its way out needs space, too
    tile_bytes, out_bytes = (2 * tile + 16) * head_bytes, 32 * head_bytes
    if is_fp8:  # queries have two bytes; values and probabilities are also held in fp16
        tile_bytes, out_bytes = (2 * tile + 32) * head_bytes, tile * (2 * head_bytes + 32)
    buffers = min(3 if single else 2, (shared_bytes - out_bytes) // tile_bytes)
    programs = 1 if single or 2 * (buffers * tile_bytes + out_bytes) > shared_bytes else 2
    # if a tile spans blocks, the load of its block numbers takes pipeline stages, too
    num_stages = 1 + buffers * (2 if block_size % tile else 1)
    return DecodeTile(tile, 4, num_stages, programs, 16 if single else 8)


def decode_constants(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_rows: int,
    window: int,
    launch: DecodeTile,
) -> dict[str, int]:
    """The kernel's compile-time constants. ROWS_P has few values, so buckets share kernels."""
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
        "ROWS_P": next(
            (rows for rows in (1, 16, 64, 256) if num_rows <= rows),
            triton.next_power_of_2(num_rows),
        ),
        "PARTS": max(1, min(launch.max_parts, 4096 // (group_p * head_p))),  # 64 registers a thread
        "MIN_WORKERS": 16,
        "WINDOW": max(0, window),
    }
