"""The ladders of static sizes, and the choice of a rung."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Rows per decode step. Small rungs are close because a step there is bound by the weights, whatever the padding;
# from 32 on the attention of a padding row costs one slot, so the rungs can stand wider. Above 160 they stand where cuBLAS does
# well: the four products of a layer of Qwen3-8B take 128, 139, 148, 146, 165 and 158 µs at 160, 176, 192, 208, 224 and 256 rows
# (H200). 224 is one all the same: where power is the limit rows of padding cost like others, and a layer with 209 rows of 700
# tokens takes 329 µs in a bucket of 224 and 340 in one of 256. On an NPU every rung is a graph of the whole step, which takes
# long to compile: the ladder begins at 16.
DECODE_ROWS = {
    "cuda": (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 176, 208, 224, 256),
    "npu": (16, 32, 48, 64, 96, 128, 160, 192, 224, 256),
    "cpu": (1, 4, 16, 32),
}

# Tokens per prefill step; long prompts fill the largest rung exactly. Above 512 padding takes as long as tokens do, so
# there a rung is twice the one before, and about half of a step at most is padding. Up to 512, where a step is short
# anyway, it is four times the one before: that is all that a CPU has, unless larger steps are asked for. On an NPU every
# rung is a graph of the whole step, which takes long to compile: there it is four times all the way.
PREFILL_GROWTH, PREFILL_SMALLEST_TOKENS = 4, 32
PREFILL_LARGE_GROWTH, PREFILL_LARGE_TOKENS = {"npu": 4}, 512

# Requests that may share one prefill step; more would widen the block table of every prefill program.
PREFILL_ROWS = 64


def decode_ladder(
    requested: Sequence[int] | None, max_rows: int, device_type: str
) -> tuple[int, ...]:
    """Ascending row counts, up to the first that holds `max_rows`: of those asked for, or of the device's own.

    The device's own end in `max_rows` itself where that is below its largest.
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
    """Ascending token counts that end in `max_tokens`."""
    ladder = [max_tokens]
    while (
        smaller := ladder[0] // _prefill_growth(ladder[0], device_type)
    ) >= PREFILL_SMALLEST_TOKENS:
        ladder.insert(0, smaller // 16 * 16)
    return tuple(ladder)


def _prefill_growth(num_tokens: int, device_type: str) -> int:
    """How many times the rung before a rung of `num_tokens` goes into it."""
    return (
        PREFILL_LARGE_GROWTH.get(device_type, 2)
        if num_tokens > PREFILL_LARGE_TOKENS
        else PREFILL_GROWTH
    )


def coarse(num_blocks: int) -> int:
    """At most 6 % less, in steps of a power of two. Where programs know the size of the cache, two starts that find a little
    more or less free memory then have the same programs.
    """
    step = 1 << max(0, num_blocks.bit_length() - 5)
    return num_blocks // step * step


def smallest_fit(ladder: Sequence[int], size: int) -> int:
    """The first rung that holds `size`; ValueError when none does."""
    rung_idx = bisect_left(ladder, size)
    if rung_idx == len(ladder):
        raise ValueError(f"size {size} is above the largest bucket {ladder[-1]}")
    return ladder[rung_idx]
