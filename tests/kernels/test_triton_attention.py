"""Triton paged attention, decode and prefill, against the reference in fp32."""

import pytest
import torch

from nanovllm.kernels import reference
from nanovllm.kernels.triton import common as triton_common
from nanovllm.kernels.triton.attention_decode import paged_attention_decode
from nanovllm.kernels.triton.attention_prefill import paged_attention_prefill
from nanovllm.kernels.triton.register import paged_attention
from tests.kernels.paged import assert_close, device, paged_cache


def check_decode(
    seq_lens: list[int],
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 64,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    cache = paged_cache(seq_lens, num_kv_heads, head_dim, block_size, dtype, window)
    q_RNH = torch.randn(len(seq_lens), num_heads, head_dim, device=device).to(dtype)
    actual = paged_attention_decode(q_RNH, *cache, head_dim**-0.5, window)
    k_cache, v_cache, block_table, seq_len = cache
    # the reference runs on the same rounded inputs, in fp32
    q_start = torch.arange(len(seq_lens) + 1, dtype=torch.int32, device=device)
    expected = reference.attention.paged_attention(
        q_RNH.float(),
        k_cache.float(),
        v_cache.float(),
        block_table,
        seq_len,
        q_start,
        1,
        head_dim**-0.5,
        window,
    )
    assert_close(actual, expected)


@pytest.mark.parametrize(
    "seq_lens", [[1], [19], [99], [989], [64], [128, 0, 1, 63, 65], [0], [0, 0, 700, 0]]
)
def test_decode_matches_the_reference_at_odd_lengths(seq_lens: list[int]) -> None:
    check_decode(seq_lens)


def test_decode_balances_rows_whose_lengths_differ_20_times() -> None:
    check_decode([100, 2000, 19, 1, 0, 989, 150, 333])
    check_decode([5] * 19 + [999] + [7] * 10)


@pytest.mark.parametrize("num_rows", [16, 17, 99])
def test_decode_matches_the_reference_at_odd_batch_sizes(num_rows: int) -> None:
    check_decode([(37 * row) % 150 for row in range(num_rows)], num_heads=2, num_kv_heads=1)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_decode_matches_the_reference_at_each_head_size(head_dim: int) -> None:
    check_decode([99, 1, 230], head_dim=head_dim)
    check_decode([99, 1, 230], head_dim=head_dim, block_size=16, dtype=torch.float16)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (14, 2), (16, 1), (8, 8), (10, 2), (24, 1)]
)
def test_decode_matches_the_reference_at_each_group_size(num_heads: int, num_kv_heads: int) -> None:
    check_decode([99, 300], num_heads=num_heads, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("block_size", [16, 48, 64, 80, 128, 256])
def test_decode_matches_the_reference_at_each_block_size(block_size: int) -> None:
    check_decode([99, 300, 1, 0], block_size=block_size)


@pytest.mark.parametrize("window", [1, 19, 64, 100, 5000])
@pytest.mark.parametrize("block_size", [16, 64])
def test_decode_sees_only_the_window(window: int, block_size: int) -> None:
    check_decode([99, 300, 1, 0, 64], window=window, block_size=block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_matches_the_reference_in_each_dtype(dtype: torch.dtype) -> None:
    check_decode([99, 300, 19], head_dim=128, dtype=dtype)


def test_decode_of_a_row_does_not_depend_on_timing_or_on_earlier_calls() -> None:
    cache = paged_cache([500, 30, 77], 2, 64, 64, torch.float16)
    q_RNH = torch.randn(3, 4, 64, device=device).half()
    first = paged_attention_decode(q_RNH, *cache, 0.125, 0)
    for _ in range(3 if device == "cpu" else 50):
        assert torch.equal(first, paged_attention_decode(q_RNH, *cache, 0.125, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [True, False])
def test_a_captured_decode_follows_the_lengths(warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph is replayed with other lengths.

    Without `warm`, the first call of the process is captured.
    """
    monkeypatch.setattr(triton_common, "_counters", {})
    k_cache, v_cache, block_table, seq_len = paged_cache(
        [2000, 700, 1500, 64], 2, 64, 64, torch.float16
    )
    q_RNH = torch.randn(4, 4, 64, device=device).half()
    arguments = (q_RNH, k_cache, v_cache, block_table, seq_len, 0.125, 0)
    paged_attention_decode(*arguments)  # compiles
    if not warm:
        triton_common._counters.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = paged_attention_decode(*arguments)
    q_start = torch.arange(5, dtype=torch.int32, device=device)
    for lens in (
        [2000, 700, 1500, 64],
        [1, 1, 1, 1],
        [1999, 0, 1, 64],
        [0, 0, 0, 0],
        [3, 699, 1500, 63],
    ):
        seq_len.copy_(torch.tensor(lens))
        graph.replay()
        expected = reference.attention.paged_attention(
            q_RNH.float(),
            k_cache.float(),
            v_cache.float(),
            block_table,
            seq_len,
            q_start,
            1,
            0.125,
            0,
        )
        assert_close(actual, expected)


def test_a_scale_that_is_not_positive_is_refused() -> None:
    cache = paged_cache([5], 1, 32, 16, torch.float32)
    with pytest.raises(ValueError, match="scale"):
        paged_attention_decode(torch.randn(1, 2, 32, device=device), *cache, 0.0, 0)


def check_prefill(
    rows: list[tuple[int, int]],
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 64,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    num_padding: int = 0,
) -> None:
    """rows: (new tokens, tokens in the cache before them)."""
    q_lens = [new for new, _ in rows]
    seq_lens = [new + old for new, old in rows]
    k_cache, v_cache, block_table, seq_len = paged_cache(
        seq_lens, num_kv_heads, head_dim, block_size, dtype
    )
    q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
    q_TNH = torch.randn(sum(q_lens) + num_padding, num_heads, head_dim, device=device).to(dtype)
    if num_padding:
        q_TNH[-num_padding:] = float("nan")
    max_q_len = max(2, *q_lens)
    actual = paged_attention_prefill(
        q_TNH, k_cache, v_cache, block_table, seq_len, q_start, max_q_len, head_dim**-0.5, window
    )
    expected = reference.attention.paged_attention(
        q_TNH.float(),
        k_cache.float(),
        v_cache.float(),
        block_table,
        seq_len,
        q_start,
        max_q_len,
        head_dim**-0.5,
        window,
    )
    assert_close(actual, expected)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 0)],
        [(19, 0)],
        [(99, 0)],
        [(300, 0)],
        [(19, 99)],
        [(1, 99), (64, 64), (5, 0)],
        [(0, 0), (33, 0), (0, 0), (1, 0)],
        [(128, 128), (0, 50), (2, 1)],
    ],
)
def test_prefill_matches_the_reference_at_odd_lengths(rows: list[tuple[int, int]]) -> None:
    check_prefill(rows)


def test_prefill_of_many_rows_finds_each_row() -> None:
    check_prefill(
        [(1 + row * 7 % 40, row * 13 % 50) for row in range(33)], num_heads=2, num_kv_heads=1
    )


@pytest.mark.parametrize("num_padding", [1, 19, 200])
def test_prefill_gives_zeros_to_tokens_of_no_row(num_padding: int) -> None:
    check_prefill([(19, 0), (5, 60)], num_padding=num_padding)
    check_prefill([(0, 0), (0, 0)], num_padding=num_padding)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_prefill_matches_the_reference_at_each_head_size(head_dim: int) -> None:
    check_prefill([(70, 3)], head_dim=head_dim)
    check_prefill([(70, 3)], head_dim=head_dim, dtype=torch.float16)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (14, 2), (16, 1), (8, 8), (10, 2), (24, 1)]
)
def test_prefill_matches_the_reference_at_each_group_size(
    num_heads: int, num_kv_heads: int
) -> None:
    check_prefill([(50, 20), (3, 0)], num_heads=num_heads, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("block_size", [16, 48, 80, 128, 256])
def test_prefill_matches_the_reference_at_each_block_size(block_size: int) -> None:
    check_prefill([(99, 40), (30, 0)], block_size=block_size, dtype=torch.float16)


@pytest.mark.parametrize("window", [1, 19, 64, 5000])
@pytest.mark.parametrize("block_size", [16, 64])
def test_prefill_sees_only_the_window(window: int, block_size: int) -> None:
    check_prefill([(99, 100), (30, 0)], window=window, block_size=block_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefill_matches_the_reference_in_each_dtype(dtype: torch.dtype) -> None:
    check_prefill([(150, 99), (19, 0)], head_dim=128, dtype=dtype)


def test_prefill_before_the_first_row_gives_zeros() -> None:
    k_cache, v_cache, block_table, seq_len = paged_cache([9], 1, 32, 16, torch.float32)
    q_start = torch.tensor([70, 79], dtype=torch.int32, device=device)
    q_TNH = torch.randn(79, 2, 32, device=device)
    arguments = (k_cache, v_cache, block_table, seq_len, q_start, 9, 1.0, 0)
    assert_close(
        paged_attention_prefill(q_TNH, *arguments),
        reference.attention.paged_attention(q_TNH, *arguments),
    )


@pytest.mark.parametrize("max_q_len", [1, 4])
def test_queries_may_be_a_strided_view(max_q_len: int) -> None:
    k_cache, v_cache, block_table, seq_len = paged_cache([40, 19, 5], 2, 32, 16, torch.float32)
    qkv = torch.randn(3, 8, 32, device=device)
    q_start = torch.arange(4, dtype=torch.int32, device=device)
    arguments = (k_cache, v_cache, block_table, seq_len, q_start, max_q_len, 0.2, 0)
    assert_close(
        paged_attention(qkv[:, :4], *arguments),
        reference.attention.paged_attention(qkv[:, :4], *arguments),
    )
