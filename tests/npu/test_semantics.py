"""The meanings in semantics.py equal torch's functions of the same names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.npu import semantics


@pytest.mark.parametrize("size", [1, 19, 99])
def test_rms_norm_is_torchs(size: int) -> None:
    x, gamma = torch.randn(3, size), torch.randn(size)
    y, rstd = semantics.rms_norm(x, gamma, 1e-5)
    torch.testing.assert_close(y, F.rms_norm(x, (size,), gamma, 1e-5))
    assert rstd.shape == (3, 1)
    y, _, added = semantics.add_rms_norm(x, 2 * x, gamma, 1e-5)
    torch.testing.assert_close(added, 3 * x)
    torch.testing.assert_close(y, F.rms_norm(3 * x, (size,), gamma, 1e-5))


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    x = torch.randn(5, 38)
    torch.testing.assert_close(semantics.swiglu(x), F.silu(x[:, :19]) * x[:, 19:])


def test_gelu_is_the_form_with_tanh() -> None:
    x = 3 * torch.randn(5, 38)
    found = semantics.gelu(x)
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh"))
    assert (found - F.gelu(x)).abs().max() > 1e-5


def test_rotary_mul_is_a_complex_rotation() -> None:
    x, angle = torch.randn(5, 1, 3, 16), torch.randn(5, 1, 1, 8)
    full = torch.cat((angle, angle), dim=-1)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(semantics.rotary_mul(x, full.cos(), full.sin()), expected)


def test_scatter_nd_update_writes_in_place_and_nowhere_else() -> None:
    var, updates = torch.zeros(3, 4, 2), torch.randn(2, 2)
    out = semantics.scatter_nd_update(var, torch.tensor([[2, 1], [0, 3]]), updates)
    assert out.data_ptr() == var.data_ptr()
    expected = torch.zeros(3, 4, 2)
    expected[2, 1], expected[0, 3] = updates
    assert torch.equal(var, expected)
    with pytest.raises(AssertionError, match="is outside"):
        semantics.scatter_nd_update(var, torch.tensor([[3, 0]]), updates[:1])


def paged(keys: list[Tensor], block_size: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Blocks [blocks, block_size, K·D] with rows' keys [S, K, D] from the last down, else NaN."""
    _, num_kv_heads, head_dim = keys[0].shape
    cache = torch.full((num_blocks, block_size, num_kv_heads * head_dim), float("nan"))
    table = torch.zeros(
        len(keys), max(-(-len(row) // block_size) for row in keys), dtype=torch.int32
    )
    free = iter(reversed(range(num_blocks)))
    for index, row in enumerate(keys):
        for start in range(0, len(row), block_size):
            block = next(free)
            part = row[start : start + block_size].flatten(1)
            cache[block, : len(part)] = part
            table[index, start // block_size] = block
    return cache, table


@pytest.mark.parametrize(
    "lengths", [[(1, 1)], [(1, 129), (1, 5)], [(3, 3), (7, 200), (0, 0), (2, 131)]], ids=str
)
def test_attention_is_torchs(lengths: list[tuple[int, int]]) -> None:
    """(new tokens, all tokens) per row; layout BSH if every row has one new token, else TND."""
    num_heads, num_kv_heads, head_dim, block_size = 4, 2, 8, 128
    keys = [torch.randn(kv_len, num_kv_heads, head_dim) for _, kv_len in lengths]
    values = [torch.randn_like(row) for row in keys]
    query = torch.randn(sum(q_len for q_len, _ in lengths), num_heads, head_dim)
    key_cache, table = paged(keys, block_size, 8)
    value_cache, _ = paged(values, block_size, 8)
    is_decode = all(q_len == 1 for q_len, _ in lengths)
    ends = torch.tensor([q_len for q_len, _ in lengths]).cumsum(0).tolist()
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    out = semantics.fused_infer_attention_score(
        query.flatten(1).unsqueeze(1) if is_decode else query,
        key_cache,
        value_cache,
        atten_mask=None if is_decode else mask,
        actual_seq_lengths=None if is_decode else ends,
        actual_seq_lengths_kv=[kv_len for _, kv_len in lengths],
        block_table=table,
        num_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        scale=0.3,
        input_layout="BSH" if is_decode else "TND",
        sparse_mode=0 if is_decode else 3,
        block_size=block_size,
    ).view(-1, num_heads, head_dim)
    for (q_len, kv_len), end, row_keys, row_values in zip(lengths, ends, keys, values):
        causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        q, k, v = (
            tensor.transpose(0, 1) for tensor in (query[end - q_len : end], row_keys, row_values)
        )
        if q_len:
            expected = F.scaled_dot_product_attention(
                q, k, v, attn_mask=causal, scale=0.3, enable_gqa=True
            )
            torch.testing.assert_close(out[end - q_len : end], expected.transpose(0, 1))


def test_running_token_counts_must_end_in_the_number_of_tokens() -> None:
    with pytest.raises(AssertionError, match="do not end in T"):
        semantics.fused_infer_attention_score(
            torch.zeros(5, 1, 8), torch.zeros(2, 128, 8), torch.zeros(2, 128, 8), num_heads=1,
            block_size=128, actual_seq_lengths=[4], actual_seq_lengths_kv=[4],
            block_table=torch.zeros(1, 1, dtype=torch.int32),
            atten_mask=torch.ones(2048, 2048, dtype=torch.bool).triu(1), input_layout="TND",
            sparse_mode=3,
        )  # fmt: skip
