"""Ladders ascend and hold what they must; the chosen bucket is the smallest that fits."""

from __future__ import annotations

from itertools import pairwise

import pytest

from nanovllm.compile import buckets
from nanovllm.platforms import cpu, cuda, npu


@pytest.mark.parametrize("default", [(1, 4, 16, 32), cuda.TRAITS.decode_rows, (7, 99)], ids=str)
@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 16, 19, 32, 33, 99, 256, 257, 989])
def test_default_decode_ladder_ascends_to_max_rows_or_the_default_s_largest(
    default: tuple[int, ...], max_rows: int
) -> None:
    ladder = buckets.decode_ladder(None, max_rows, default)
    assert list(ladder) == sorted(set(ladder))
    assert ladder[-1] == min(max_rows, default[-1]) and set(ladder) <= {*default, max_rows}


@pytest.mark.parametrize(
    ("requested", "max_rows", "expected"),
    [
        ([2], 2, (2,)),
        ([8, 1, 4, 4], 8, (1, 4, 8)),
        ((3, 7, 19, 5), 19, (3, 5, 7, 19)),
        ([1, 4, 16, 64], 5, (1, 4, 16)),  # a bucket of 64 would never run
        ([7], 99, (7,)),  # larger batches run in several steps
        ([99], 1, (99,)),
    ],
)
def test_requested_decode_sizes_are_taken_as_they_are(
    requested: list[int], max_rows: int, expected: tuple[int, ...]
) -> None:
    assert buckets.decode_ladder(requested, max_rows, (1, 4, 16, 32)) == expected


@pytest.mark.parametrize("device_growth", [2, 4])
@pytest.mark.parametrize("max_tokens", [1, 16, 19, 99, 127, 128, 512, 513, 989, 2048, 8192, 16384])
def test_prefill_ladder_ascends_to_max_tokens(max_tokens: int, device_growth: int) -> None:
    ladder = buckets.prefill_ladder(max_tokens, device_growth)
    assert ladder[-1] == max_tokens
    assert list(ladder) == sorted(set(ladder))
    for smaller, larger in pairwise(ladder):
        assert smaller % 16 == 0
        assert smaller >= buckets.PREFILL_SMALLEST_TOKENS // 16 * 16
        growth = device_growth if larger > 512 else 4
        assert larger - 16 * growth < smaller * growth <= larger


def test_prefill_ladders_are_close_where_padding_takes_long() -> None:
    gpu = buckets.prefill_ladder(8192, cuda.TRAITS.prefill_growth)
    assert gpu == (32, 128, 512, 1024, 2048, 4096, 8192)
    assert buckets.prefill_ladder(8192, npu.TRAITS.prefill_growth) == (32, 128, 512, 2048, 8192)
    assert buckets.prefill_ladder(512, cpu.TRAITS.prefill_growth) == (32, 128, 512)


@pytest.mark.parametrize("ladder", [(1,), (3, 7, 19), [1, 2, 4, 8], (32, 128, 512), (989,)])
def test_smallest_fit_is_the_first_rung_that_holds_the_size(ladder: tuple[int, ...]) -> None:
    for size in range(1, ladder[-1] + 1):
        assert buckets.smallest_fit(ladder, size) == min(rung for rung in ladder if rung >= size)


@pytest.mark.parametrize("ladder", [(1,), (3, 7, 19), (32, 128, 512)])
def test_a_size_above_the_ladder_is_refused_with_both_numbers(ladder: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=f"size {ladder[-1] + 1} is above the largest bucket {ladder[-1]}"
    ):
        buckets.smallest_fit(ladder, ladder[-1] + 1)


def test_coarse_sizes_are_few_and_lose_little() -> None:
    sizes = range(1, 5000)
    rounded = [buckets.coarse(size) for size in sizes]
    assert all(size - size / 16 < small <= size for size, small in zip(sizes, rounded))
    assert len(set(rounded)) < 160 and rounded[:31] == list(sizes[:31])
    assert {buckets.coarse(size) for size in range(4096, 4352)} == {4096}
