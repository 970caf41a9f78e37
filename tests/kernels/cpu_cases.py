"""Inputs of the CPU kernels, and how close their results are to those of `reference/`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.cpu import library as cpu_library

_is_available, _reason = cpu_library.available()
NEEDS_COMPILER = pytest.mark.skipif(not _is_available, reason=f"no C++ compiler: {_reason}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative to the largest value: fp32 sums have another order; 16-bit results may round to the
# neighbour
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_matches(out: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    limit = (TOLERANCE[expected.dtype] if tolerance is None else tolerance) * max(
        1.0, expected.float().abs().max().item()
    )
    assert (out.float() - expected.float()).abs().max().item() <= limit  # a NaN fails, too


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many small calls.

    On a busy machine a call that wakes threads may wait for a time slice.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def attention_case(
    seq_lens: list[int],
    q_lens: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    window: int = 0,
    max_q_len: int | None = None,
    num_extra_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float, int]:
    """Pages in random order. Slots of no row are NaN; table entries past a row's pages are -1."""
    kv_dtype = kv_dtype or dtype
    generator = torch.Generator().manual_seed(len(seq_lens) * 1000 + head_dim)
    num_rows = len(seq_lens)
    num_pages = [-(-seq_len // block_size) for seq_len in seq_lens]
    num_blocks = sum(num_pages) + 3
    k_cache_CBKH = torch.full(
        (num_blocks, block_size, num_kv_heads, head_dim), float("nan"), dtype=kv_dtype
    )
    v_cache_CBKH = k_cache_CBKH.clone()
    free = torch.randperm(num_blocks, generator=generator).tolist()
    block_table_RP = torch.full((num_rows, max(num_pages) + 2), -1, dtype=torch.int32)
    for row, seq_len in enumerate(seq_lens):
        for page in range(num_pages[row]):
            block, num_used = free.pop(), min(block_size, seq_len - page * block_size)
            block_table_RP[row, page] = block
            for cache in (k_cache_CBKH, v_cache_CBKH):
                cache[block, :num_used] = torch.randn(
                    num_used, num_kv_heads, head_dim, generator=generator
                ).to(kv_dtype)
    q_start_S = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32)
    q_TNH = torch.randn(
        sum(q_lens) + num_extra_tokens, num_heads, head_dim, generator=generator
    ).to(dtype)
    max_q_len = max(q_lens) if max_q_len is None else max_q_len
    seq_len_R = torch.tensor(seq_lens, dtype=torch.int32)
    return (
        q_TNH,
        k_cache_CBKH,
        v_cache_CBKH,
        block_table_RP,
        seq_len_R,
        q_start_S,
        max_q_len,
        head_dim**-0.5,
        window,
    )


SEQ_LENS = [1, 19, 99, 0, 389, 16]
PROMPTS = [1, 19, 7, 0, 101, 16]  # whole prompts, and parts of prompts after a cached prefix


def assert_close_to_reference(out: Tensor, expected: Tensor) -> None:
    # a 16-bit result may round to the reference's neighbour, and an early rounding may pass through
    # a product
    torch.testing.assert_close(
        out, expected, rtol=4 * TOLERANCE[expected.dtype], atol=4 * TOLERANCE[expected.dtype]
    )
