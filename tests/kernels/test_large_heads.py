"""Heads of 512 numbers, and caches whose blocks are parts of larger blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.triton.attention_decode import paged_attention_decode
from nanovllm.kernels.triton.attention_prefill import paged_attention_prefill
from nanovllm.kernels.triton.rope_store import qk_norm_rope_store, store_kv

device = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS, BLOCK, NUM_KV, HEAD = 7, 16, 1, 512


def parts(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The second of two layers' caches in each tensor."""
    whole = torch.randn(2, BLOCKS, 2 * BLOCK * NUM_KV * HEAD, device=device).to(dtype)
    k, v = (one.chunk(2, dim=1)[1].unflatten(1, (BLOCK, NUM_KV, HEAD)) for one in whole)
    return k, v


@pytest.mark.parametrize("max_q_len", [1, 19])
def test_attention(max_q_len: int) -> None:
    torch.manual_seed(0)
    k_cache, v_cache = parts()
    table = torch.tensor([[4, 0, 0], [2, 6, 0]], dtype=torch.int32, device=device)
    seq_len = torch.tensor([9, 27], dtype=torch.int32, device=device)
    nums = [1, 1] if max_q_len == 1 else [9, 19]
    q_start = torch.tensor([0, nums[0], sum(nums)], dtype=torch.int32, device=device)
    q = torch.randn(sum(nums), 2, HEAD, device=device) * HEAD**-0.5
    wanted = reference.attention.paged_attention(
        q, k_cache, v_cache, table, seq_len, q_start, max_q_len, 1.0, 0
    )
    if max_q_len == 1:
        found = paged_attention_decode(q, k_cache, v_cache, table, seq_len, 1.0, 0)
    else:
        rest = (table, seq_len, q_start, max_q_len, 1.0, 0)
        found = paged_attention_prefill(q, k_cache, v_cache, *rest)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    own = ops.paged_attention(q, k_cache, v_cache, table, seq_len, q_start, max_q_len, 1.0, 0)
    torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


def test_stores_change_their_own_part_alone() -> None:
    torch.manual_seed(0)
    num, slot = 3, torch.tensor([5, 40, 100], device=device)
    table = torch.randn(8, HEAD, device=device)
    qkv, pos = torch.randn(num, 4 * HEAD, device=device), torch.tensor([0, 3, 7], device=device)
    norm = torch.randn(HEAD, device=device)
    results = []
    for write in (reference.rope_store.qk_norm_rope_store, qk_norm_rope_store):
        torch.manual_seed(1)
        caches = parts()
        q = write(qkv, norm, norm, table, pos, slot, *caches, 2, 1e-6)
        results.append((q, caches[0]._base, caches[1]._base))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    torch.manual_seed(1)
    k_cache, v_cache = parts()
    before = k_cache._base.clone()  # type: ignore[union-attr]
    k, v = torch.randn(2, num, NUM_KV, HEAD, device=device)
    store_kv(k, v, k_cache, v_cache, slot)
    for i, at in enumerate(slot.tolist()):
        assert torch.equal(k_cache[at // BLOCK, at % BLOCK], k[i])
        assert torch.equal(v_cache[at // BLOCK, at % BLOCK], v[i])
    changed = (k_cache._base != before).sum()  # type: ignore[union-attr]
    assert changed == 2 * k.numel()  # keys and values have one base
