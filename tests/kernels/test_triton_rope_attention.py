"""Head norms, rotation, cache write and attention of one row in one launch: against the reference, and against two launches."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm.compile.lower import plan
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops, reference, triton_common, triton_kernels
from nanovllm.kernels.triton_attention_decode import paged_attention_decode, rope_attention_decode, takes_rope
from nanovllm.kernels.triton_rope_store import qk_norm_rope_store
from nanovllm.models import dense
from nanovllm.models.dense import Batch, Layer, LayerCache
from nanovllm.platforms.cuda import CudaPlatform
from tests.kernels.paged import assert_close, device, paged_cache

EPS = 1e-6
LENGTHS = [1, 2, 63, 64, 65, 128, 129, 300, 989]


class Step(NamedTuple):
    """The op's arguments before the cache, between cache and scales, and the scales."""

    raw: tuple[Any, ...]
    cache: tuple[Tensor, Tensor]
    rest: tuple[Any, ...]
    scales: tuple[Tensor, ...] = ()

    def cache_copy(self) -> tuple[Tensor, Tensor]:
        return self.cache[0].clone(), self.cache[1].clone()


def rotary_table(num_positions: int, head_dim: int) -> Tensor:
    angle = torch.arange(num_positions)[:, None] / 10000 ** (torch.arange(head_dim // 2) / (head_dim // 2))
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)


def one_row(
    seq_len: int,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 64,
    window: int = 0,
    dtype: torch.dtype = torch.float16,
    norms: tuple[bool, bool] = (True, True),
    index_dtype: torch.dtype = torch.int64,
    fp8: bool = False,
) -> Step:
    """A row of so many tokens, the newest of which is not in the cache yet: its slot is NaN, as is all that it may not see."""
    cache = paged_cache([seq_len], num_kv_heads, head_dim, block_size, dtype, window)
    k_cache, v_cache, block_table, seq_len_R = cache
    slot = int(block_table[0, (seq_len - 1) // block_size]) * block_size + (seq_len - 1) % block_size
    for part in (k_cache, v_cache):
        part.view(-1, num_kv_heads, head_dim)[slot] = float("nan")
    qkv_RE = torch.randn(1, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    weights = [torch.rand(head_dim, device=device).to(dtype) + 0.5 if norm else None for norm in norms]
    pos_R, slot_R = (torch.tensor([number], device=device, dtype=index_dtype) for number in (seq_len - 1, slot))
    raw = (qkv_RE, *weights, rotary_table(max(seq_len, 99), head_dim), pos_R, slot_R)
    rest = (num_heads, EPS, block_table, seq_len_R, head_dim**-0.5, window)
    if not fp8:
        return Step(raw, (k_cache, v_cache), rest)
    scales = tuple(torch.rand(2, num_kv_heads, device=device) * 0.01 + 0.01)
    return Step(raw, (k_cache.to(torch.float8_e4m3fn), v_cache.to(torch.float8_e4m3fn)), rest, scales)


def bits(cache: Tensor) -> Tensor:
    return cache.contiguous().view(torch.uint8)


def check(seq_len: int, **shape: Any) -> None:
    """Results near the reference's; the cache the reference's to the bit, save for a new key's last one.

    Norms add up in another order, and a GPU fuses multiplications with additions.
    """
    step = one_row(seq_len, **shape)
    expected_cache, actual_cache = step.cache_copy(), step.cache_copy()
    expected = reference.rope_attention(*step.raw, *expected_cache, *step.rest, *step.scales)
    actual = rope_attention_decode(*step.raw, *actual_cache, *step.rest, *step.scales)
    assert actual.dtype is expected.dtype
    assert_close(actual, expected)
    num_kv_heads, head_dim = step.cache[0].shape[2:]
    slot = int(step.raw[5])
    for before, wanted, found in zip(step.cache, expected_cache, actual_cache, strict=True):
        before, wanted, found = (part.view(-1, num_kv_heads, head_dim) for part in (before, wanted, found))
        others = torch.arange(len(before), device=device) != slot
        assert torch.equal(bits(found)[others], bits(before)[others]), "only the token's slot may be written"
        eps = torch.finfo(found.dtype).eps
        torch.testing.assert_close(found[slot].float(), wanted[slot].float(), rtol=4 * eps, atol=4 * eps)
    if device == "cpu" and step.raw[2] is None:
        assert torch.equal(bits(actual_cache[0]), bits(expected_cache[0]))
    assert torch.equal(bits(actual_cache[1]), bits(expected_cache[1]))


@pytest.mark.parametrize("seq_len", LENGTHS)
def test_one_launch_matches_the_reference_at_each_length(seq_len: int) -> None:
    check(seq_len)
    check(seq_len, dtype=torch.float32)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_one_launch_matches_the_reference_at_each_head_size(head_dim: int) -> None:
    check(99, head_dim=head_dim)
    check(65, head_dim=head_dim, norms=(False, False), dtype=torch.float32)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (14, 2), (16, 1), (8, 8), (8, 4), (8, 2), (16, 2), (24, 1)]
)
def test_one_launch_matches_the_reference_at_each_group_size(num_heads: int, num_kv_heads: int) -> None:
    check(300, num_heads=num_heads, num_kv_heads=num_kv_heads)
    check(64, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128)


@pytest.mark.parametrize("block_size", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("seq_len", [1, 97, 257])
def test_one_launch_matches_the_reference_at_each_block_size(block_size: int, seq_len: int) -> None:
    check(seq_len, block_size=block_size)


@pytest.mark.parametrize("window", [2, 19, 64, 65, 100, 5000])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("seq_len", [1, 64, 65, 300])
def test_one_launch_sees_only_the_window(window: int, block_size: int, seq_len: int) -> None:
    check(seq_len, window=window, block_size=block_size)


@pytest.mark.parametrize("norms", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_one_launch_leaves_out_norms_without_a_weight(norms: tuple[bool, bool], index_dtype: torch.dtype) -> None:
    if index_dtype is torch.int64 or device == "cpu":
        check(65, norms=norms, index_dtype=index_dtype)


@pytest.mark.parametrize("seq_len", [1, 64, 300])
@pytest.mark.parametrize("shape", [{}, {"head_dim": 128, "num_heads": 8}, {"head_dim": 96, "block_size": 128}])
def test_one_launch_matches_the_reference_over_an_fp8_cache(seq_len: int, shape: dict[str, Any]) -> None:
    check(seq_len, **shape, fp8=True)


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_one_launch_stores_and_answers_what_two_do(seq_len: int, fp8: bool, norm: bool) -> None:
    """In bf16, where the interpreter cuts in place of rounding, but in both the same way."""
    step = one_row(seq_len, head_dim=128, dtype=torch.bfloat16, norms=(norm, norm), fp8=fp8)
    num_heads, eps, *rest = step.rest
    two_cache, one_cache = step.cache_copy(), step.cache_copy()
    q_RNH = qk_norm_rope_store(*step.raw, *two_cache, num_heads, eps, *step.scales)
    two = paged_attention_decode(q_RNH, *two_cache, *rest, None, *step.scales)
    one = rope_attention_decode(*step.raw, *one_cache, *step.rest, *step.scales)
    assert_close(one, two)
    eps = torch.finfo(one_cache[0].dtype).eps
    torch.testing.assert_close(one_cache[0].float(), two_cache[0].float(), rtol=4 * eps, atol=4 * eps, equal_nan=True)
    if device == "cpu" and not norm:
        assert torch.equal(bits(one_cache[0]), bits(two_cache[0]))
    assert torch.equal(bits(one_cache[1]), bits(two_cache[1]))


def test_the_projection_and_the_cache_may_be_strided_views() -> None:
    step = one_row(99)
    wide = torch.stack([step.raw[0], step.raw[0] + 1], dim=-1)
    caches = torch.stack([part.clone() for part in step.cache], dim=2).unbind(2)
    expected_cache = step.cache_copy()
    expected = reference.rope_attention(*step.raw, *expected_cache, *step.rest)
    assert_close(rope_attention_decode(wide[..., 0], *step.raw[1:], *caches, *step.rest), expected)
    for found, wanted in zip(caches, expected_cache, strict=True):
        torch.testing.assert_close(found, wanted, rtol=4e-3, atol=4e-3, equal_nan=True)


def test_a_token_leaves_no_trace_in_the_next_launch() -> None:
    step = one_row(500)
    first = rope_attention_decode(*step.raw, *step.cache, *step.rest)
    for _ in range(2 if device == "cpu" else 50):
        assert torch.equal(first, rope_attention_decode(*step.raw, *step.cache, *step.rest))


def test_what_one_launch_does_not_take() -> None:
    half, single = torch.empty(1, 64, dtype=torch.bfloat16), torch.empty(1, 64)
    one_head, eight_heads, wide = torch.empty(3, 16, 1, 128), torch.empty(3, 16, 8, 80), torch.empty(3, 16, 8, 256)
    assert takes_rope(half, one_head, 16, 0) and takes_rope(half, eight_heads, 8, 2)
    assert not takes_rope(half.expand(2, 64), eight_heads, 16, 0)
    assert not takes_rope(half, eight_heads, 16, 1)
    assert not takes_rope(half, one_head, 17, 0)
    assert not takes_rope(half, wide, 16, 0)
    assert not takes_rope(single, eight_heads, 16, 0)
    step = one_row(5)
    with pytest.raises(ValueError, match="window of 1"):
        rope_attention_decode(*step.raw, *step.cache, *step.rest[:-1], 1)
    with pytest.raises(ValueError, match="got 2 rows"):
        rope_attention_decode(step.raw[0].repeat(2, 1), *step.raw[1:], *step.cache, *step.rest)


@pytest.mark.parametrize(
    ("num_rows", "dtype", "has_matrix_units", "fused"),
    [
        (1, torch.bfloat16, True, True),
        (2, torch.bfloat16, True, False),
        (1, torch.float32, True, False),
        (1, torch.float16, False, False),
    ],
)
def test_a_gpu_s_decode_step_of_one_row_has_it_and_needs_no_compiler(
    num_rows: int, dtype: torch.dtype, has_matrix_units: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_common, "has_matrix_units", lambda device: has_matrix_units)
    platform = object.__new__(CudaPlatform)  # which needs no GPU to name its passes
    platform.device = torch.device("cuda")
    H, D, F = 64, 128, 256
    weights = {"norm_D": (D,), "qkv_ED": (8 * H, D), "head_norm_H": (H,), "out_DQ": (D, 4 * H)}
    inputs: dict[str, Any] = {name: torch.empty(shape, dtype=dtype) for name, shape in weights.items()}
    inputs |= {"gate_up_GD": torch.empty(2 * F, D, dtype=dtype), "down_DF": torch.empty(D, F, dtype=dtype)}
    inputs["kv"] = LayerCache(*torch.empty(2, 3, 16, 2, H, dtype=dtype).clone().unbind(0))
    rows = torch.arange(num_rows)
    table_RP = torch.zeros(num_rows, 2, dtype=torch.int32)
    inputs["batch"] = Batch(rows, rows, table_RP, rows.int(), torch.arange(num_rows + 1).int())
    inputs |= {"cos_sin_MH": torch.empty(40, H), "h_TD": torch.empty(num_rows, D, dtype=dtype)}
    cfg = SimpleNamespace(norm_eps=EPS, head_dim=H, num_heads=4, num_kv_heads=2, attention_backend="")

    def layer(
        norm: Tensor, qkv: Tensor, head_norm: Tensor, out: Tensor, gate_up: Tensor, down: Tensor, *rest: Any
    ) -> Any:
        kv, batch, cos_sin, h_TD = rest
        w = Layer(norm, qkv, None, head_norm, head_norm, out, None, norm, gate_up, None, down, None)
        cast: Any = cfg
        return dense.layer(cast, 0, 1, w, kv, cos_sin, batch, h_TD)

    graph, fakes, _ = trace(layer, inputs)
    for _, one in platform.passes(fuse=True):
        graph = one(graph, fakes)
    names = [name for node in graph.graph.nodes if (name := ops.op_name(node.target))]
    assert ("rope_attention" in names) == fused
    assert ("paged_attention" in names) == ("qk_norm_rope_store" in names) == (not fused)
    assert plan.is_enough(graph)
    assert not fused or names == ["fused_linear", "rope_attention"] + ["fused_linear"] * 3


def test_the_op_means_its_two_parts_and_has_its_kernel() -> None:
    triton_kernels.register()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("nanovllm::rope_attention", "CUDA")
    step = one_row(70)
    num_heads, eps, *rest = step.rest
    op_cache, parts_cache = step.cache_copy(), step.cache_copy()
    actual = ops.rope_attention(*step.raw, *op_cache, *step.rest)
    q_RNH = ops.qk_norm_rope_store(*step.raw, *parts_cache, num_heads, eps)
    table, seq_len, scale, window = rest
    q_start = torch.tensor([0, 1], dtype=torch.int32, device=device)
    expected = ops.paged_attention(q_RNH, *parts_cache, table, seq_len, q_start, 1, scale, window)
    assert_close(actual, expected)
    for found, wanted in zip(op_cache, parts_cache, strict=True):
        torch.testing.assert_close(found, wanted, rtol=4e-3, atol=4e-3, equal_nan=True)
