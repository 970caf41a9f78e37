"""The sizes of the launches of `lora.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import triton

from nanovllm.kernels.reference.lora import TOKENS, tile_tokens

INNER = 64  # the most inner values of a program
MIN_COLUMNS, MIN_COLUMNS_OF_MANY = 128, 512  # of a program of the first launch
MAX_SPLITS = 32
STAGE_BYTES = 20 * 1024
MATRIX_BYTES = 32 * 1024
MAX_PARTS = 8
MIN_OUTPUTS, MAX_OUTPUTS = 16, 256
MANY_NUMBERS = 8192  # of the outputs of a program with 8 warps
MOST_INNER = 8192  # inner values of all splits that a program loads at once
SHRINK_WARPS, MOST_STAGES = 4, 5


class Sizes(NamedTuple):
    """The sizes of both launches: tokens of a program, columns of a split, and the splits."""

    tokens: int
    split_depth: int
    num_splits: int


def sizes_of(
    num_tokens: int, num_inner: int, depth: int, num_processors: int, num_bytes: int
) -> Sizes:
    """Splits of the columns give programs to all multiprocessors. The second launch reads the
    results of all splits, so tokens of many programs have few."""
    tokens = tile_tokens(num_tokens)
    tiles = triton.cdiv(num_tokens, tokens) * triton.cdiv(num_inner, inner_size(num_inner))
    wanted = max(1, min(MAX_SPLITS, num_processors // tiles))
    least = MIN_COLUMNS
    if wanted < MAX_SPLITS // 2:  # long rows have two programs for each multiprocessor
        wanted, least = 2 * wanted, MIN_COLUMNS_OF_MANY
    unit = columns_of(num_inner, tokens, num_bytes)
    if num_processors < tiles:
        wanted = 1
    columns = triton.cdiv(max(least, triton.cdiv(depth, wanted)), unit) * unit
    return Sizes(tokens, columns, triton.cdiv(depth, columns))


def inner_size(num_inner: int) -> int:
    """The inner values of a program."""
    return max(16, min(INNER, triton.next_power_of_2(num_inner)))


def columns_of(num_inner: int, tokens: int, num_bytes: int) -> int:
    """Columns at a time, of numbers of so many bytes: three stages of x and of a fit 64 KB."""
    fitting = STAGE_BYTES // ((tokens + inner_size(num_inner)) * num_bytes)
    return int(min(256, 1 << (fitting.bit_length() - 1)))


def num_outputs(
    rows: Sequence[int], rank: int, num_bytes: int, silu_mul: bool, tokens: int = TOKENS
) -> int:
    """The outputs of a program: no boundary between parts is within them, and their matrix fits
    the shared memory of all GPUs. Those after the only part, such as a head's, are masked. With
    `silu_mul` it has as many of up. Each program reads the inner values, which are as many bytes as
    its outputs where they have several splits."""
    fitting = MATRIX_BYTES // (padded_rank(rank) * num_bytes)
    most = min(MAX_OUTPUTS, max(MIN_OUTPUTS, fitting // 2 if silu_mul else fitting))
    if silu_mul:
        most = most if tokens == TOKENS else max(MIN_OUTPUTS, most // 2)
        return math.gcd(most, sum(rows) // 2, *rows)
    return most if len(rows) == 1 else math.gcd(most, *rows)


def expand_warps(constants: Mapping[str, int]) -> int:
    """The warps of a program of the second launch."""
    num = constants["TOKENS"] * constants["OUTPUTS"] * (2 if constants["SILU_MUL"] else 1)
    return 8 if num >= MANY_NUMBERS else 4


def shrink_stages(shared_bytes: int) -> int:
    """The stages of the first launch: few programs run side by side, so all columns of a split may
    be on their way at once."""
    return MOST_STAGES if shared_bytes >= MOST_STAGES * STAGE_BYTES + 8192 else 3


def splits_at_once(sizes: Sizes, rank: int) -> int:
    """The splits whose inner values a program of the second launch loads at once."""
    most = max(1, MOST_INNER // (sizes.tokens * padded_rank(rank)))
    return int(min(triton.next_power_of_2(sizes.num_splits), most))


def padded_rank(rank: int) -> int:
    return int(max(16, triton.next_power_of_2(rank)))


def shrink_constants(num_inner: int, depth: int, sizes: Sizes, num_bytes: int) -> dict[str, int]:
    """The first kernel's compile-time constants."""
    return {
        "NUM_INNER": num_inner,
        "DEPTH": depth,
        "SPLIT_DEPTH": sizes.split_depth,
        "TOKENS": sizes.tokens,
        "INNER": inner_size(num_inner),
        "COLUMNS": columns_of(num_inner, sizes.tokens, num_bytes),
    }


def part_ends(rows: Sequence[int]) -> dict[str, int]:
    """END_p: the first output after part p."""
    ends = [sum(rows[: i + 1]) for i in range(len(rows))] + [sum(rows)] * MAX_PARTS
    return {f"END_{i}": ends[i] for i in range(MAX_PARTS - 1)}


def expand_constants(
    rows: Sequence[int], rank: int, sizes: Sizes, num_bytes: int, silu_mul: bool
) -> dict[str, int]:
    """The second kernel's compile-time constants."""
    return {
        "TOTAL": sum(rows),
        "NUM_INNER": len(rows) * rank,
        "RANK": rank,
        "RANK_P": padded_rank(rank),
        "SPLITS": sizes.num_splits,
        "AT_ONCE": splits_at_once(sizes, rank),
        **part_ends(rows),
        "TOKENS": sizes.tokens,
        "OUTPUTS": num_outputs(rows, rank, num_bytes, silu_mul, sizes.tokens),
        "SILU_MUL": silu_mul,
    }
