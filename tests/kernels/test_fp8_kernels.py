"""An fp8 cache: writes to it and attention over it, in Triton and C++, match the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cpu import attention as cpu_attention
from nanovllm.kernels.triton import register as triton_kernels
from nanovllm.kernels.triton import rope_store as triton_rope_store

device = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
NANS = (0x7F, 0xFF)  # all NaNs of the format
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Keys and values have a relative error of 2.6 % (three bits of mantissa, root mean square). Scores
# have a standard deviation of 1 here, so scores and probabilities have the same error: together 3.7
# % of a result if values are independent of each other.
UNQUANTISED_TOLERANCE = 0.06


def attention_case(
    rows: list[tuple[int, int]],
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(arguments up to max_q_len, the scales, the cache before rounding).

    `rows` are (new tokens, tokens before them). Blocks are shuffled with gaps. Slots that no row
    may read hold one of the NaNs.
    """
    seq_lens = [new + old for new, old in rows]
    num_blocks = [-(-seq_len // block_size) for seq_len in seq_lens]
    shape = (2 * sum(num_blocks) + 3, block_size, num_kv_heads, head_dim)
    plain = torch.full((2, *shape), float("nan"))
    table_RP = torch.zeros(len(rows), max(num_blocks) + 2, dtype=torch.int32)
    owned = (torch.randperm(shape[0] - 1) + 1)[: sum(num_blocks)].split(num_blocks)
    for row, ((new, _), seq_len, blocks) in enumerate(zip(rows, seq_lens, owned, strict=True)):
        table_RP[row, : len(blocks)] = blocks
        values = torch.randn(2, seq_len, num_kv_heads, head_dim) * torch.tensor([1.0, 0.02]).view(
            2, 1, 1, 1
        )
        if window and seq_len - new >= window:
            values[:, : seq_len - new + 1 - window] = float("nan")
        for i, block in enumerate(blocks.tolist()):
            piece = values[:, i * block_size : (i + 1) * block_size]
            plain[:, block, : piece.shape[1]] = piece
    scales = torch.tensor([[2.0**-4, 2.0**-6], [2.0**-12, 2.0**-10]])[
        :, torch.arange(num_kv_heads) % 2
    ]
    caches = [
        reference.rope_store.to_fp8(x, scale_K) for x, scale_K in zip(plain, scales, strict=True)
    ]
    for cache in caches:
        held = cache.view(torch.uint8)
        held[cache.float().isnan()] = torch.tensor(NANS, dtype=torch.uint8)[
            torch.arange(int(cache.isnan().sum())) % 2
        ]
    q_TNH = torch.randn(sum(new for new, _ in rows), num_heads, head_dim).to(dtype)
    q_start_S = torch.tensor([0, *[new for new, _ in rows]]).cumsum(0).int()
    arguments = [q_TNH, *caches, table_RP, torch.tensor(seq_lens, dtype=torch.int32), q_start_S]
    to = [[x.to(device) for x in xs] for xs in (arguments, list(scales), list(plain))]
    return to[0], to[1], to[2]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and not actual.isnan().any()
    return float(
        (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6)
    )


def check(
    rows: list[tuple[int, int]], *, decode: bool = False, window: int = 0, **shape: object
) -> None:
    case = attention_case(rows, window=window, **shape)  # type: ignore[arg-type]
    arguments, scales, plain = case
    max_q_len = 1 if decode else max(2, *(new for new, _ in rows))
    q_TNH, *others = arguments
    rest = (max_q_len, q_TNH.shape[2] ** -0.5, window)
    expected = reference.attention.paged_attention(q_TNH.float(), *others, *rest, *scales)
    actual = triton_kernels.paged_attention(q_TNH, *others, *rest, *scales)
    assert actual.dtype is q_TNH.dtype
    assert relative_error(actual, expected) < TOLERANCE[q_TNH.dtype]
    if device == "cpu":
        assert (
            relative_error(cpu_attention.paged_attention(q_TNH, *others, *rest, *scales), expected)
            < (TOLERANCE[q_TNH.dtype])
        )
    unquantised = reference.attention.paged_attention(q_TNH.float(), *plain, *others[2:], *rest)
    assert relative_error(actual, unquantised) < UNQUANTISED_TOLERANCE


@pytest.mark.parametrize(
    "seq_lens", [[1], [19], [99], [989], [128, 1, 63, 65], [300, 19, 1, 150, 64]]
)
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_decode_at_odd_lengths(seq_lens: list[int], block_size: int) -> None:
    check([(1, seq_len - 1) for seq_len in seq_lens], decode=True, block_size=block_size)


@pytest.mark.parametrize(
    "rows", [[(1, 0), (99, 0)], [(19, 99)], [(1, 99), (64, 64), (5, 0)], [(128, 128), (2, 1)]]
)
@pytest.mark.parametrize("block_size", [16, 128])
def test_prefill_at_odd_lengths(rows: list[tuple[int, int]], block_size: int) -> None:
    check(rows, block_size=block_size)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
class TestBoth:
    def rows(self, decode: bool) -> list[tuple[int, int]]:
        return [(1, 98), (1, 0), (1, 149)] if decode else [(19, 80), (3, 0), (1, 149)]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_in_each_dtype(self, decode: bool, dtype: torch.dtype) -> None:
        check(self.rows(decode), decode=decode, head_dim=128, block_size=128, dtype=dtype)

    @pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
    def test_at_each_group_size(self, decode: bool, group: int) -> None:
        check(self.rows(decode), decode=decode, num_heads=2 * group)

    @pytest.mark.parametrize("head_dim", [16, 64, 80, 256])
    def test_at_each_head_size(self, decode: bool, head_dim: int) -> None:
        check(self.rows(decode), decode=decode, head_dim=head_dim)

    @pytest.mark.parametrize("window", [1, 19, 64, 5000])
    def test_sees_only_the_window(self, decode: bool, window: int) -> None:
        check(self.rows(decode), decode=decode, window=window)


def test_an_empty_row_gives_zeros() -> None:
    (q_TNH, *others), scales, _ = attention_case([(1, 30), (1, 5)])
    others[3][1] = 0
    for paged_attention in (
        reference.attention.paged_attention,
        triton_kernels.paged_attention,
        cpu_attention.paged_attention,
    ):
        if device == "cpu" or paged_attention is not cpu_attention.paged_attention:
            out = paged_attention(q_TNH, *others, 1, 0.2, 0, *scales)
            assert not out[1].any() and out[0].any()


STORES = [reference.rope_store.store_kv, triton_rope_store.store_kv]


@pytest.mark.parametrize("store_kv", STORES, ids=["reference", "triton"])
def test_every_e4m3_value_is_stored_exactly_and_ties_go_to_even(
    store_kv: Callable[..., None],
) -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(FP8)
    grid = grid[~grid.isnan()].float().unique()  # −0 and 0 are one
    ties = (grid[1:] + grid[:-1]) / 2
    for values, expected in ((grid, grid), (ties, ties.to(FP8).float())):
        x = torch.zeros(1, 2, 256)
        x[:, :, : len(values)] = values
        cache = torch.zeros(2, 1, 16, 2, 256, device=device).to(FP8)
        scales = torch.tensor([[0.25, 8.0], [1.0, 2.0**-20]])
        k, v = ((x * scale_K[:, None]).to(device) for scale_K in scales)
        store_kv(k, v, *cache, torch.tensor([3], device=device), *scales.to(device))
        assert torch.equal(
            cache[:, 0, 3, :, : len(values)].float().cpu(), expected.expand(2, 2, -1)
        )
        cache.view(torch.uint8)[:, :, 3] = 0
        assert not cache.view(torch.uint8).any(), "only the token's slot may be written"


@pytest.mark.parametrize("store_kv", STORES, ids=["reference", "triton"])
def test_finite_values_saturate_and_nan_stays_nan(store_kv: Callable[..., None]) -> None:
    x = torch.tensor(
        [449.0, -3.0e38, 464.0, 480.0, -1e6, 448.0, float("inf"), float("nan")] * 2, device=device
    )
    cache = torch.zeros(2, 1, 16, 1, 16, device=device).to(FP8)
    one = torch.ones(1, device=device)
    store_kv(x.view(1, 1, 16), x.view(1, 1, 16), *cache, torch.tensor([0], device=device), one, one)
    expected = torch.tensor([448.0, -448, 448, 448, -448, 448, 448, float("nan")] * 2)
    torch.testing.assert_close(
        cache[:, 0, 0, 0].float().cpu(), expected.expand(2, -1), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (14, 2, 80), (16, 8, 128)]
)
def test_the_fused_store_writes_the_same_as_the_reference(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    num_tokens = 19
    qkv_TE = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(
        dtype
    )
    norms = [torch.rand(head_dim, device=device).to(dtype) + 0.5 for _ in range(2)]
    angle = torch.rand(99, head_dim // 2, device=device) * 6
    table = torch.cat((angle.cos(), angle.sin()), dim=-1)
    pos_T, slot_T = (
        torch.randint(99, (num_tokens,)).to(device),
        torch.randperm(48)[:num_tokens].to(device),
    )
    scales = 2.0 ** torch.randint(-8, 0, (2, num_kv_heads)).float().to(device)
    caches = [
        torch.zeros(2, 3, 16, num_kv_heads, head_dim, device=device).to(FP8) for _ in range(3)
    ]
    arguments = (qkv_TE, *norms, table, pos_T, slot_T)
    expected = reference.rope_store.qk_norm_rope_store(
        *arguments, *caches[0], num_heads, 1e-6, *scales
    )
    functions = [triton_rope_store.qk_norm_rope_store] + [cpu_attention.qk_norm_rope_store] * (
        device == "cpu"
    )
    for function, cache in zip(functions, caches[1:]):
        q_TNH = function(*arguments, *cache, num_heads, 1e-6, *scales)
        eps = torch.finfo(dtype).eps * 4
        torch.testing.assert_close(
            q_TNH, expected, rtol=eps, atol=eps * float(expected.abs().max())
        )
        actual, wanted = cache.float(), caches[0].float()
        assert wanted[0].any() and torch.equal(actual[1], wanted[1])  # values are only divided
        # norm and rotation may round keys and queries differently, so a key may fall on the other
        # side of a step of e4m3
        step = wanted[0].abs() * 0.125 + 2.0**-9
        rounding = eps * wanted[0].abs().amax()
        assert ((actual[0] - wanted[0]).abs() <= step + rounding).all()
        if dtype is not torch.bfloat16:  # the interpreter truncates bf16 instead of rounding it
            assert float((actual[0] != wanted[0]).float().mean()) < 0.005


def test_a_nan_within_a_row_is_not_hidden() -> None:
    """The tests above rely on NaN staying NaN, in the interpreter as well."""
    (q_TNH, *others), scales, _ = attention_case([(1, 30), (1, 5)])
    k_cache, v_cache, table_RP = others[:3]
    v_cache.view(torch.uint8)[table_RP[0, 1], 3] = NANS[0]
    k_cache.view(torch.uint8)[table_RP[1, 0], 2] = NANS[1]
    assert triton_kernels.paged_attention(q_TNH, *others, 1, 0.2, 0, *scales)[0].isnan().all()
