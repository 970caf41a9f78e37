"""Triton attention over latents, and their write into the cache, against the references in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton.latent_decode import (
    LatentTile,
    decode_tile,
    head_tile,
    latent_attention_decode,
)
from nanovllm.kernels.triton.latent_inputs import head_linear, latent_inputs
from nanovllm.kernels.triton.latent_prefill import latent_attention_prefill
from nanovllm.kernels.triton.register import latent_span_attention
from tests.kernels.paged import assert_close, device, exact_attention, paged_cache

LATENT, ROTATED = 40, 8
SCALE = 0.2


def latents(
    seq_lens: list[int], block_size: int, dtype: torch.dtype, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A cache of latents, the block table and the lengths; slots that no row may read are NaN."""
    cache_CB1Z, _, table, seq_len = paged_cache(seq_lens, 1, sum(sizes), block_size, dtype)
    return cache_CB1Z.squeeze(2), table, seq_len


def check_decode(
    seq_lens: list[int],
    num_heads: int = 4,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int] = (LATENT, ROTATED),
    launch: LatentTile | None = None,
) -> None:
    cache, table, seq_len = latents(seq_lens, block_size, dtype, sizes)
    q_RNZ = torch.randn(len(seq_lens), num_heads, sum(sizes), device=device).to(dtype)
    found = latent_attention_decode(q_RNZ, cache, table, seq_len, SCALE, sizes[0], launch)
    start = torch.arange(len(seq_lens) + 1, dtype=torch.int32, device=device)
    expected = reference.latent_attention.latent_attention(
        q_RNZ.float(), cache.float(), table, seq_len, start, 1, SCALE, sizes[0]
    )
    assert_close(found, expected)


@pytest.mark.parametrize("seq_lens", [[1], [99], [989], [64], [128, 0, 1, 63, 65], [0, 0, 700, 0]])
def test_decode_matches_the_reference_at_odd_lengths(seq_lens: list[int]) -> None:
    check_decode(seq_lens)


def test_decode_balances_rows_whose_lengths_differ_20_times() -> None:
    check_decode([100, 1000, 19, 1, 0, 333], num_heads=2)
    check_decode([5] * 19 + [499], num_heads=1)


@pytest.mark.parametrize(("num_heads", "heads"), [(1, 1), (5, 5), (16, 16), (20, 10), (34, 17)])
def test_decode_takes_heads_in_tiles(num_heads: int, heads: int) -> None:
    check_decode([99, 30], num_heads=num_heads, launch=LatentTile(heads, 16, 4, 1))


@pytest.mark.parametrize("block_size", [16, 19, 128])
def test_decode_takes_blocks_of_any_size(block_size: int) -> None:
    check_decode([99, 30], block_size=block_size, launch=LatentTile(4, 32, 4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_in_16_bits_with_the_sizes_of_deepseek(dtype: torch.dtype) -> None:
    check_decode([70, 3], num_heads=16, dtype=dtype, sizes=(512, 64))


def test_tiles_of_heads_divide_them() -> None:
    assert [head_tile(num, 64) for num in (1, 16, 20, 40, 128, 67, 96)] == [
        1,
        16,
        20,
        40,
        64,
        1,
        48,
    ]
    for num_heads in (16, 20, 128):
        for shared_bytes in (64 << 10, 99 << 10, 227 << 10):
            assert num_heads % decode_tile(num_heads, 1152, False, shared_bytes).heads == 0


# several tokens a row --------------------------------------------------------------------------


def check_prefill(
    rows: list[tuple[int, int]],
    num_heads: int = 4,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
    before: int = 0,
    after: int = 0,
) -> None:
    """Rows of (new, cached) tokens, beside tokens of no row."""
    cache, table, seq_len = latents(
        [new + old for new, old in rows], block_size, dtype, (LATENT, ROTATED)
    )
    num_new = [new for new, _ in rows]
    start = torch.tensor([0, *num_new], dtype=torch.int32, device=device).cumsum(0).int() + before
    num_tokens = sum(num_new) + before + after
    q_TNZ = torch.randn(num_tokens, num_heads, LATENT + ROTATED, device=device).to(dtype)
    longest = max(num_new)
    found = latent_attention_prefill(q_TNZ, cache, table, seq_len, start, longest, SCALE, LATENT)
    entries = cache.unsqueeze(2)
    expected = exact_attention(q_TNZ, entries, entries, table, seq_len, start, SCALE, 0)
    assert_close(found, expected[..., :LATENT].to(dtype))


@pytest.mark.parametrize(
    "rows", [[(1, 0)], [(19, 99)], [(50, 0), (3, 70)], [(0, 0), (65, 1), (0, 5), (1, 64)]]
)
def test_prefill_matches_the_formula_at_odd_lengths(rows: list[tuple[int, int]]) -> None:
    check_prefill(rows)


def test_prefill_gives_zeros_to_tokens_of_no_row() -> None:
    check_prefill([(19, 3), (7, 0)], before=5, after=9)


@pytest.mark.parametrize(("num_heads", "block_size"), [(1, 19), (5, 16), (20, 64)])
def test_prefill_takes_heads_and_blocks_of_any_number(num_heads: int, block_size: int) -> None:
    check_prefill([(21, 30)], num_heads=num_heads, block_size=block_size)


def test_prefill_in_bf16() -> None:
    check_prefill([(21, 30)], dtype=torch.bfloat16)


# inputs and results ----------------------------------------------------------------------------

HEADS, PLAIN, VALUE = 3, 16, 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 19])
def test_queries_are_absorbed_and_latents_stored(num_tokens: int, dtype: torch.dtype) -> None:
    """From parts of a wide projection."""
    q_size, entry_size = HEADS * (PLAIN + ROTATED), LATENT + ROTATED
    wide_TX = torch.randn(num_tokens, q_size + entry_size, device=device).to(dtype)
    q_TQ, kv_TZ = wide_TX.split([q_size, entry_size], dim=-1)
    q_TNH = q_TQ.unflatten(1, (HEADS, -1))
    key_NPL = torch.randn(HEADS, PLAIN, LATENT, device=device).to(dtype) / 4
    norm_L = torch.randn(LATENT, device=device).to(dtype)
    table_Mr = torch.randn(64, ROTATED, device=device)
    pos_T = torch.randint(64, (num_tokens,), device=device)
    slot_T = torch.randperm(5 * 16, device=device)[:num_tokens]
    results = []
    for made in (latent_inputs, reference.latent_attention.latent_inputs):
        cache = torch.zeros(5, 16, entry_size, device=device, dtype=dtype)
        found = made(q_TNH, key_NPL, kv_TZ, norm_L, table_Mr, pos_T, slot_T, cache, 1e-6)
        results.append((*found, cache))
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape and ours.is_contiguous()
        if num_tokens:
            assert_close(ours, expected)


def test_results_are_multiplied_by_the_matrices_of_their_heads() -> None:
    x_TNI, weight_NOI = torch.randn(7, 3, 16, device=device), torch.randn(3, 5, 16, device=device)
    expected = torch.einsum("tni,noi->tno", x_TNI, weight_NOI)
    for made in (head_linear, reference.latent_attention.head_linear):
        found = made(x_TNI, weight_NOI)
        assert found.is_contiguous()
        assert_close(found, expected)


# prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_size", [VALUE, 30, 300])
@pytest.mark.parametrize("max_q_len", [8, 40])
def test_rows_with_and_without_older_tokens_give_what_absorbed_rows_give(
    max_q_len: int, value_size: int
) -> None:
    """Values are smaller or larger than keys, or too large to be expanded; short steps are
    absorbed. Tokens of no row are before and after, and unused slots of the cache are NaN."""
    rows = [(5, 0), (0, 9), (8, 0), (3, 20), (1, 0)]
    if max_q_len > 8:
        rows += [(37, 0), (19, 40)]
    sizes = (LATENT, ROTATED)
    cache, table, seq_len = latents([new + old for new, old in rows], 16, torch.float32, sizes)
    start = torch.tensor([0, *(new for new, _ in rows)], device=device).cumsum(0).int() + 3
    num_tokens = int(start[-1]) + 4
    key_NPL, value_NVL = (
        torch.randn(HEADS, size, LATENT, device=device) / 4 for size in (PLAIN, value_size)
    )
    q_TNH = torch.randn(num_tokens, HEADS, PLAIN + ROTATED, device=device)
    plain_TNP, rotated_TNr = q_TNH.split([PLAIN, ROTATED], dim=-1)
    absorbed_TNL = torch.einsum("tnp,npl->tnl", plain_TNP, key_NPL)
    q_TNZ = torch.cat((absorbed_TNL, rotated_TNr), dim=-1)
    entry_TZ = torch.randn(num_tokens, LATENT + ROTATED, device=device)
    for row, (new, old) in enumerate(rows):
        slots = [int(table[row, i // 16]) * 16 + i % 16 for i in range(old, old + new)]
        entry_TZ[start[row] : start[row + 1]] = cache.view(-1, LATENT + ROTATED)[slots]
    tables = (cache, table, seq_len, start)
    o_TNL = reference.latent_attention.latent_attention(q_TNZ, *tables, max_q_len, SCALE, LATENT)
    expected = torch.einsum("tnl,nvl->tnv", o_TNL, value_NVL)
    arguments = (q_TNH, q_TNZ, entry_TZ, key_NPL, value_NVL, *tables, max_q_len, SCALE)
    for made in (latent_span_attention, reference.latent_attention.latent_span_attention):
        assert_close(made(*arguments), expected)
