"""The ladders of bucket sizes, and the choice of a bucket."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Rows per decode step. From 32 rows on the sizes lie further apart, since a row of padding attends
# to one slot only. On CUDA the sizes above 160 are those at which cuBLAS is fast, and 224, which
# saves power. On an NPU each size is a graph of the whole step, which compiles slowly: no size is
# below 16.
DECODE_ROWS = {
    "cuda": (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 176, 208, 224, 256),
    "npu": (16, 32, 48, 64, 96, 128, 160, 192, 224, 256),
    "cpu": (1, 4, 16, 32),
}

# Tokens per prefill step; long prompts fill the largest bucket exactly. Up to 512 tokens a step is
# short anyway, so each size is four times the one before. Above 512 padding takes as long as
# tokens, so each size is twice the one before, except on an NPU, where graphs compile slowly.
PREFILL_GROWTH, PREFILL_SMALLEST_TOKENS = 4, 32
PREFILL_LARGE_GROWTH, PREFILL_LARGE_TOKENS = {"npu": 4}, 512

# The most requests in one prefill step. It is the height of every prefill program's block table.
PREFILL_ROWS = 64


def decode_ladder(
    requested: Sequence[int] | None, max_rows: int, device_type: str
) -> tuple[int, ...]:
    """Ascending bucket sizes in rows: those requested, or else the device's.

    Requested sizes end with the first that holds `max_rows`. The device's end with `max_rows`
    itself, or with the device's largest size if that is smaller.
    """
    if requested is not None:
        sizes = sorted(set(requested))
        return tuple(sizes[: bisect_left(sizes, max_rows) + 1])
    default = DECODE_ROWS.get(device_type, DECODE_ROWS["cpu"])
    return (
        *(rows for rows in default if rows < max_rows),
        *((max_rows,) if max_rows <= default[-1] else ()),
    )


def prefill_ladder(max_tokens: int, device_type: str) -> tuple[int, ...]:
    """Ascending bucket sizes in tokens; the last one is `max_tokens`."""
    ladder = [max_tokens]
    while (
        smaller := ladder[0] // _prefill_growth(ladder[0], device_type)
    ) >= PREFILL_SMALLEST_TOKENS:
        ladder.insert(0, smaller // 16 * 16)
    return tuple(ladder)


def _prefill_growth(num_tokens: int, device_type: str) -> int:
    """The ratio of a bucket of `num_tokens` to the next smaller one."""
    return (
        PREFILL_LARGE_GROWTH.get(device_type, 2)
        if num_tokens > PREFILL_LARGE_TOKENS
        else PREFILL_GROWTH
    )


def coarse(num_blocks: int) -> int:
    """`num_blocks` rounded down by at most 6 %, to a multiple of a power of two.

    If programs know the size of the cache, starts with slightly different free memory then share
    programs.
    """
    step = 1 << max(0, num_blocks.bit_length() - 5)
    return num_blocks // step * step


def smallest_fit(ladder: Sequence[int], size: int) -> int:
    """The smallest bucket that holds `size`. Raises ValueError if none does."""
    bucket_idx = bisect_left(ladder, size)
    if bucket_idx == len(ladder):
        raise ValueError(f"size {size} is above the largest bucket {ladder[-1]}")
    return ladder[bucket_idx]
