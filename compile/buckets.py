"""Buckets: the static sizes for which steps are compiled, and the choice of a size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Adjacent prefill buckets grow by this factor up to PREFILL_LARGE_TOKENS, where steps are short
# even with padding, and by the device's factor above.
PREFILL_GROWTH, PREFILL_SMALLEST_TOKENS, PREFILL_LARGE_TOKENS = 4, 32, 512

# Requests that may share a prefill step: this is the height of its block table.
PREFILL_ROWS = 64


def decode_ladder(
    requested: Sequence[int] | None, max_rows: int, default: Sequence[int]
) -> tuple[int, ...]:
    """Ascending numbers of rows, up to the first that is at least `max_rows`.

    They come from `requested` or, if None, from the ascending ladder `default`. In the latter case
    the last is `max_rows` itself, unless `default` ends below it.
    """
    if requested is not None:
        sizes = sorted(set(requested))
        return tuple(sizes[: bisect_left(sizes, max_rows) + 1])
    last = (max_rows,) if max_rows <= default[-1] else ()
    return (*(rows for rows in default if rows < max_rows), *last)


def prefill_ladder(max_tokens: int, growth: int) -> tuple[int, ...]:
    """Ascending numbers of tokens that end in `max_tokens`, so that long prompts need no padding.

    growth: ratio of adjacent sizes above `PREFILL_LARGE_TOKENS`.
    """
    ladder = [max_tokens]
    while True:
        factor = growth if ladder[0] > PREFILL_LARGE_TOKENS else PREFILL_GROWTH
        smaller = ladder[0] // factor
        if smaller < PREFILL_SMALLEST_TOKENS:
            return tuple(ladder)
        ladder.insert(0, smaller // 16 * 16)


def coarse(num_blocks: int) -> int:
    """Round down by at most 6 %, to a multiple of a power of two.

    Programs of some devices contain the number of cache blocks. Rounding lets two starts that find
    slightly different free memory share programs.
    """
    step = 1 << max(0, num_blocks.bit_length() - 5)
    return num_blocks // step * step


def smallest_fit(ladder: Sequence[int], size: int) -> int:
    """The first size of the ladder that is at least `size`; raises ValueError if there is none."""
    idx = bisect_left(ladder, size)
    if idx == len(ladder):
        raise ValueError(f"size {size} is above the largest bucket {ladder[-1]}")
    return ladder[idx]
