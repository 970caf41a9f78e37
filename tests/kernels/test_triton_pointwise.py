"""Triton head norm, rope and cache write, norms and SiLU agree with the reference.

Both get the same inputs and dtypes.
"""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.triton import register as triton_kernels
from nanovllm.kernels.triton.layer_norm import layer_norm
from nanovllm.kernels.triton.norm_act import add_rms_norm, rms_norm, silu_mul
from nanovllm.kernels.triton.rope_store import qk_norm_rope_store, rope, store_kv

device = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to one rounding of the dtype (fused multiply-adds round less often)."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    scale = torch.finfo(actual.dtype).eps * 4
    torch.testing.assert_close(
        actual, expected, rtol=scale, atol=scale * float(expected.float().abs().max())
    )


def rotary_table(num_positions: int, head_dim: int) -> Tensor:
    angle = torch.arange(num_positions)[:, None] / 10000 ** (
        torch.arange(head_dim // 2) / (head_dim // 2)
    )
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)


def check_fused(
    num_tokens: int,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    q_norm: bool = True,
    k_norm: bool = True,
    index_dtype: torch.dtype = torch.int64,
) -> None:
    num_slots = -(-2 * num_tokens // block_size) * block_size
    qkv_TE = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(
        dtype
    )
    q_norm_H = torch.rand(head_dim, device=device).to(dtype) + 0.5 if q_norm else None
    k_norm_H = torch.rand(head_dim, device=device).to(dtype) + 0.5 if k_norm else None
    table = rotary_table(989, head_dim)
    pos_T = torch.randint(989, (num_tokens,), device=device).to(index_dtype)
    slot_T = torch.randperm(num_slots, device=device)[:num_tokens].to(index_dtype)
    cache = torch.full(
        (2, num_slots // block_size, block_size, num_kv_heads, head_dim), float("nan")
    )
    actual, expected = cache.to(device, dtype), cache.to(device, dtype)
    q_actual = qk_norm_rope_store(
        qkv_TE, q_norm_H, k_norm_H, table, pos_T, slot_T, *actual, num_heads, 1e-6
    )
    q_expected = reference.rope_store.qk_norm_rope_store(
        qkv_TE, q_norm_H, k_norm_H, table, pos_T.long(), slot_T, *expected, num_heads, 1e-6
    )
    assert_close(q_actual, q_expected)
    assert torch.equal(actual.isnan(), expected.isnan()), "only the tokens' slots may be written"
    assert_close(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("num_tokens", [1, 19, 99])
def test_fused_kernel_matches_the_reference_at_odd_token_counts(num_tokens: int) -> None:
    check_fused(num_tokens)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_fused_kernel_matches_the_reference_at_each_head_size(head_dim: int) -> None:
    check_fused(5, head_dim=head_dim)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (14, 2), (16, 8), (32, 8)])
def test_fused_kernel_matches_the_reference_at_each_head_count(
    num_heads: int, num_kv_heads: int
) -> None:
    check_fused(3, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_fused_kernel_matches_the_reference_in_each_dtype(
    dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    check_fused(19, dtype=dtype, index_dtype=index_dtype)


@pytest.mark.parametrize(("q_norm", "k_norm"), [(False, False), (True, False), (False, True)])
def test_fused_kernel_leaves_out_norms_without_a_weight(q_norm: bool, k_norm: bool) -> None:
    check_fused(5, q_norm=q_norm, k_norm=k_norm, block_size=48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_rope_and_store_match_the_reference_on_strided_views(
    dtype: torch.dtype, head_dim: int
) -> None:
    qkv = torch.randn(19, 7, head_dim, device=device).to(dtype)
    table, pos_T = rotary_table(989, head_dim), torch.randint(989, (19,), device=device)
    assert_close(
        rope(qkv[:, :3], table, pos_T), reference.rope_store.rope(qkv[:, :3], table, pos_T)
    )
    slot_T = torch.randperm(48, device=device)[:19].int()
    actual, expected = torch.zeros(2, 2, 3, 16, 2, head_dim, device=device, dtype=dtype)
    store_kv(qkv[:, 3:5], qkv[:, 5:], *actual, slot_T)
    reference.rope_store.store_kv(qkv[:, 3:5], qkv[:, 5:], *expected, slot_T)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (19, 989), (99, 128), (3, 5, 96), (2, 4096)])
def test_norms_match_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(2, *shape, device=device).to(dtype)
    weight_D = torch.rand(shape[-1], device=device).to(dtype) + 0.5
    assert_close(rms_norm(x, weight_D, 1e-6), reference.norm_act.rms_norm(x, weight_D, 1e-6))
    expected = reference.norm_act.add_rms_norm(x, residual, weight_D, 1e-6)
    for actual, wanted in zip(add_rms_norm(x, residual, weight_D, 1e-6), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (19, 989), (3, 5, 96)])
def test_layer_norms_match_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(2, *shape, device=device) + 3).to(dtype)[1]
    weight_D, bias_D = torch.randn(2, shape[-1], device=device).to(dtype)
    for weight, bias in ((weight_D, bias_D), (torch.randn(x.shape[1:], device=device), None)):
        wanted = reference.norm_act.layer_norm(x, weight, bias, 1e-6)
        assert_close(layer_norm(x, weight, bias, 1e-6), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (19, 1978), (3, 5, 96), (2, 6144)])
def test_silu_mul_matches_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate_up = (4 * torch.randn(shape, device=device)).to(dtype)
    assert_close(silu_mul(gate_up), reference.norm_act.silu_mul(gate_up))


def test_norm_of_a_strided_view_reads_the_view() -> None:
    x = torch.randn(5, 200, device=device)
    assert_close(
        rms_norm(x[:, 30:94], x[0, :64], 1e-6),
        reference.norm_act.rms_norm(x[:, 30:94], x[0, :64], 1e-6),
    )
    assert_close(silu_mul(x[:, 30:94]), reference.norm_act.silu_mul(x[:, 30:94]))


def test_nothing_is_launched_for_no_tokens() -> None:
    empty = torch.empty(0, 64, device=device)
    assert rms_norm(empty, torch.ones(64, device=device), 1e-6).shape == (0, 64)
    assert silu_mul(empty).shape == (0, 32)


def test_registering_twice_is_allowed_and_covers_every_op() -> None:
    triton_kernels.register()
    triton_kernels.register()
    for name in (
        "rms_norm",
        "add_rms_norm",
        "silu_mul",
        "rope",
        "store_kv",
        "qk_norm_rope_store",
        "paged_attention",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nanovllm::{name}", "CUDA")
        assert ops.op_name(getattr(ops, name)) == name
