"""Attention in which tokens of an image see all of it: every kernel that takes `end` agrees with
the formula."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.paged import assert_close, device, exact_attention, paged_cache
from tests.kernels.test_sinks import function

BACKENDS = [name for name in ("reference", "triton", "cpu") if device == "cpu" or name != "cpu"]
# (query heads, key-value heads, head size, window)
HEADS = [(4, 2, 32, 0), (2, 1, 24, 19)]
# (new tokens, old tokens) of each row, and the images among the new ones as (first, tokens)
ROWS = [(1, 0), (24, 40), (0, 0), (40, 0), (17, 30)]
IMAGES = [[], [(3, 14), (18, 6)], [], [(0, 25), (30, 10)], [(16, 1)]]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_of_an_image_see_all_of_it(name: str, heads: tuple[int, int, int, int]) -> None:
    num_heads, num_kv_heads, head_dim, window = heads
    q_lens, lengths = [new for new, _ in ROWS], [sum(row) for row in ROWS]
    cache = paged_cache(lengths, num_kv_heads, head_dim, 16, torch.float32)
    q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
    num_tokens = sum(q_lens) + 3  # with padding
    q_TNH = torch.randn(num_tokens, num_heads, head_dim, device=device)
    end_T = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    for (_, old), start, images in zip(ROWS, q_start.tolist(), IMAGES, strict=False):
        for first, num in images:
            end_T[start + first : start + first + num] = old + first + num
    arguments = (q_TNH, *cache, q_start, max(q_lens), head_dim**-0.5, window)
    found = function(name)(*arguments, None, None, None, end_T)
    exact = (q_TNH, *cache, q_start, head_dim**-0.5, window)
    assert_close(found, exact_attention(*exact, end_T=end_T))
    causal = function(name)(*arguments)
    assert_close(causal, exact_attention(*exact))
    assert not torch.allclose(found, causal, atol=1e-2)
