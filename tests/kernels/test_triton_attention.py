"""Triton paged attention, decode and prefill, against the reference in fp32."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from nanovllm.kernels import reference
from nanovllm.kernels.triton import common as triton_common
from nanovllm.kernels.triton.attention_decode import paged_attention_decode
from nanovllm.kernels.triton.attention_prefill import paged_attention_prefill
from nanovllm.kernels.triton.attention_prefill_hopper import suits
from nanovllm.kernels.triton.register import paged_attention
from nanovllm.kernels.triton.zero_padding import zero_padding_
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


@pytest.mark.gpu  # Gluon has no interpreter; tests/kernels/builds.py compiles this kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "block_size"),
    [(16, 8, 64), (32, 8, 64), (32, 8, 16), (16, 8, 128), (8, 8, 256), (16, 2, 32), (4, 2, 48)],
)
def test_long_prefills_match_the_reference_also_with_the_kernel_for_hopper(
    num_heads: int, num_kv_heads: int, block_size: int, dtype: torch.dtype
) -> None:
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    # (new tokens, tokens in the cache before them), and tokens of no row after them
    for rows in (
        [(1, 99), (19, 500), (300, 0), (0, 77), (989, 11), (64, 64)],
        [(329, 3000), (3, 0)],
        [(0, 0), (0, 0), (5, 0), (128, 128), (128, 0), (256, 1)],
        [(1 + row * 7 % 300, row * 13 % 500) for row in range(33)],
    ):
        q_lens = [new for new, _ in rows]
        k_cache, v_cache, block_table, seq_len = paged_cache(
            [new + old for new, old in rows], num_kv_heads, 128, block_size, dtype
        )
        q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
        q_TNH = torch.randn(sum(q_lens) + 33, num_heads, 128, device=device).to(dtype)
        q_TNH[-33:] = float("nan")
        assert suits(q_TNH, k_cache, v_cache, len(q_TNH), 0) == is_hopper
        arguments = (block_table, seq_len, q_start, len(q_TNH), 0.1, 0)
        actual = paged_attention(q_TNH, k_cache, v_cache, *arguments)
        expected = reference.attention.paged_attention(
            q_TNH.float(), k_cache.float(), v_cache.float(), *arguments
        )
        assert_close(actual, expected)


def test_the_prefill_kernel_for_hopper_is_left_alone_by_what_it_does_not_support(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_of(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.setattr(torch.version, "hip", None)

    def takes(
        num_heads: int = 16, head_dim: int = 128, block_size: int = 64, max_q_len: int = 8192,
        window: int = 0, dtype: torch.dtype = torch.bfloat16, cache: torch.dtype | None = None,
    ) -> bool:  # fmt: skip
        with FakeTensorMode(allow_non_fake_inputs=True):
            q_TNH = torch.empty(300, num_heads, head_dim, dtype=dtype, device="cuda")
            shape = (9, block_size, 8, head_dim)
            k_cache, v_cache = torch.empty(2, *shape, dtype=cache or dtype, device="cuda")
        return suits(q_TNH, k_cache, v_cache, max_q_len, window)

    is_of(9, 0)
    assert takes() and takes(32) and takes(block_size=16) and takes(dtype=torch.float16)
    assert not takes(24) and not takes(head_dim=64) and not takes(block_size=24)
    assert not takes(max_q_len=128) and not takes(window=4096)
    assert not takes(dtype=torch.float32) and not takes(cache=torch.float8_e4m3fn)
    for major in (8, 10, 12):
        is_of(major, 0)
        assert not takes()


@pytest.mark.parametrize("starts", [(0, 5, 9), (3, 3, 100), (0, 0), (70, 99), (0, 130)])
@pytest.mark.parametrize("shape", [(2, 32), (3, 40), (1, 2048)])
def test_tokens_of_no_row_are_zeroed(starts: tuple[int, ...], shape: tuple[int, ...]) -> None:
    out = torch.randn(130, *shape, device=device).half()
    out[: starts[0]], out[starts[-1] :] = float("nan"), float("nan")
    expected = out.clone()
    q_start = torch.tensor(starts, dtype=torch.int32, device=device)
    reference.attention.zero_padding_(expected, q_start)
    zero_padding_(out, q_start)
    assert torch.equal(out, expected) and not out.isnan().any()
