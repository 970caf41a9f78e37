"""Attention with sinks: every kernel that takes them agrees with the formula."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import attention as cpu_attention
from tests.kernels.paged import assert_close, device, exact_attention, paged_cache

BACKENDS = ["reference", "triton", "sdpa", "cpu"]
if not importlib.util.find_spec("triton"):
    BACKENDS.remove("triton")
if device != "cpu":
    BACKENDS.remove("cpu")
# (query heads, key-value heads, head size, window): groups and windows of gpt-oss, and others
HEADS = [(8, 1, 64, 128), (4, 1, 80, 19), (6, 2, 64, 0), (6, 6, 32, 1)]
DECODE = [(1, 0), (1, 18), (1, 700), (0, 0), (1, 255)]
PREFILL = [(1, 0), (19, 99), (0, 0), (99, 0), (33, 200)]


def function(name: str) -> Callable[..., Tensor]:
    if name == "triton":
        from nanovllm.kernels.triton import register as triton_kernels

        return triton_kernels.paged_attention
    own = {"reference": reference.attention.paged_attention, "cpu": cpu_attention.paged_attention}
    return own[name] if name in own else ops.ATTENTION[name]


def check(
    name: str,
    rows: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    sink: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    num_heads, num_kv_heads, head_dim, window = heads
    q_lens = [new for new, _ in rows]
    is_decode = max(q_lens) == 1
    lengths = [sum(row) for row in rows]
    cache = paged_cache(lengths, num_kv_heads, head_dim, 64, dtype, window if is_decode else 0)
    if is_decode:  # an empty row has a token as well
        q_lens = [1] * len(rows)
    q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
    q_TNH = torch.randn(sum(q_lens), num_heads, head_dim, device=device).to(dtype)
    # scores are about 1: sinks that change little, and those that nearly all goes to
    sinks_N = 2.0 + 3.0 * torch.randn(num_heads, device=device)
    sinks_N = sinks_N.to(dtype) if sink is None else torch.full_like(sinks_N, sink).to(dtype)
    arguments = (q_TNH, *cache, q_start, max(q_lens), head_dim**-0.5, window)
    actual = function(name)(*arguments, None, None, sinks_N)
    wanted = exact_attention(q_TNH, *cache, q_start, head_dim**-0.5, window, sinks_N)
    assert_close(actual, wanted)
    if sink is None:
        plain = function(name)(*arguments)
        assert_close(plain, exact_attention(q_TNH, *cache, q_start, head_dim**-0.5, window))
        assert not torch.allclose(plain, actual, atol=1e-2)


# Triton's interpreter is slow
CASES = [(name, heads) for name in BACKENDS for heads in HEADS[: 3 if name == "triton" else 4]]


@pytest.mark.parametrize(("name", "heads"), CASES, ids=str)
@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_sinks_join_the_denominator(
    name: str, rows: list[tuple[int, int]], heads: tuple[int, int, int, int]
) -> None:
    check(name, rows, heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [DECODE[:3], PREFILL[:2]], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", BACKENDS)
def test_sinks_in_half_precision(
    name: str, rows: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    check(name, rows, HEADS[2], dtype=dtype)


@pytest.mark.parametrize("sink", [-300.0, 300.0])
@pytest.mark.parametrize("name", BACKENDS)
def test_extreme_sinks_take_nothing_or_all(name: str, sink: float) -> None:
    for rows in (DECODE, PREFILL[:2]):
        check(name, rows, HEADS[2], sink)
