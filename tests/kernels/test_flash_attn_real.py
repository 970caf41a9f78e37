"""The installed flash-attn packages on this GPU: the formula, captured graphs, and signatures.

`python -m pytest tests/kernels/test_flash_attn_real.py` tests every interface that is installed
and that the GPU runs. docs/gpus.md names the versions that have run.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import flash_attention, ops, reference
from nanovllm.kernels.flash_attention import Flash
from tests.kernels import fake_flash_attn
from tests.kernels.paged import TOLERANCE, device, paged_cache

pytestmark = [pytest.mark.gpu, pytest.mark.flash_attn]
FOUND: dict[int, Flash] = {}
if torch.cuda.is_available():
    FOUND = {
        flash.generation: flash
        for flash in flash_attention.find(
            torch.cuda.get_device_capability(), is_nvidia=torch.version.hip is None
        )[0]
    }
HALF = (torch.bfloat16, torch.float16)
# (query heads, key-value heads, head size, window): groups of 1 to 16
HEADS = [
    (16, 8, 128, 0),
    (32, 8, 128, 0),
    (4, 4, 64, 0),
    (14, 2, 64, 0),
    (16, 1, 128, 0),
    (6, 2, 80, 0),
    (5, 1, 96, 0),
    (4, 2, 256, 0),
    (4, 2, 128, 1),
    (16, 2, 64, 100),
    (8, 4, 128, 5000),
]
# (new tokens, tokens in the cache before them)
PREFILL = [(1, 0), (19, 99), (99, 0), (89, 900), (2, 17), (989, 64), (128, 128), (1, 989)]
Heads = tuple[int, int, int, int]


class Case(NamedTuple):
    """block_size: tokens of a cache block."""

    generation: int
    dtype: torch.dtype
    heads: Heads
    block_size: int


def block_sizes(generation: int, head_dim: int) -> list[int]:
    """At least 16 tokens; and the default, where it is read in another way."""
    page = flash_attention.page_tokens(FOUND[generation], head_dim)
    fast = flash_attention.fast_page_tokens(FOUND[generation], head_dim)
    return sorted({page * -(-16 // page), fast} if generation == 4 else {page * -(-16 // page)})


def is_built(generation: int, head_dim: int) -> bool:
    """A build of flash-attn 2 for tests has heads of 64 and 128 (scripts/bench)."""
    return generation != 2 or head_dim in HEADS_OF_2


HEADS_OF_2 = (64, 128)


def cases() -> list[Case]:
    """What the installed interfaces do not refuse."""
    return [
        Case(generation, dtype, heads, block_size)
        for generation, flash in FOUND.items()
        for dtype in HALF
        for heads in HEADS
        if is_built(generation, heads[2])
        and not flash_attention.unsupported(
            flash, dtype=dtype, head_dim=heads[2], block_size=0, windows=[heads[3]]
        )
        for block_size in block_sizes(generation, heads[2])
    ]


def plain(generation: int, heads: Heads) -> Case:
    """In bf16, in the default blocks."""
    page = flash_attention.fast_page_tokens(FOUND[generation], heads[2])
    return Case(generation, torch.bfloat16, heads, page * -(-16 // page))


def cache_for(lens: list[int], case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`paged_cache` in the case's blocks. Slots past a row's end in its own last block, which
    flash-attn may read, hold large numbers; blocks of no row hold NaN."""
    _, dtype, (_, num_kv_heads, head_dim, _), block_size = case
    k_cache, v_cache, table, seq_len = paged_cache(lens, num_kv_heads, head_dim, block_size, dtype)
    owned = torch.cat(
        [table[row, : -(-length // block_size)] for row, length in enumerate(lens)]
    ).long()
    for cache in (k_cache, v_cache):
        cache[owned] = cache[owned].nan_to_num(1000.0)
    return k_cache, v_cache, table, seq_len


def check(case: Case, rows: list[tuple[int, int]], *, tail: int = 0) -> None:
    """`tail`: tokens of no row, NaN, after the last row."""
    generation, dtype, heads, _ = case
    q_lens = [new for new, _ in rows]
    cache = cache_for([sum(row) for row in rows], case)
    q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
    q_TNH = torch.randn(sum(q_lens) + tail, heads[0], heads[2], device=device).to(dtype)
    q_TNH[sum(q_lens) :] = float("nan")
    compare(generation, q_TNH, cache, q_start, max(q_lens), heads[3])


def compare(
    generation: int,
    q_TNH: Tensor,
    cache: tuple[Tensor, Tensor, Tensor, Tensor],
    q_start: Tensor,
    max_q_len: int,
    window: int,
) -> None:
    scale = q_TNH.shape[2] ** -0.5
    rest = (cache[2], cache[3], q_start, max_q_len, scale, window)
    attend = ops.ATTENTION[f"flash_attn_{generation}"]
    assert_near(attend(q_TNH, cache[0], cache[1], *rest), expected(q_TNH, cache, *rest[2:]))


def expected(
    q_TNH: Tensor,
    cache: tuple[Tensor, Tensor, Tensor, Tensor],
    q_start: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    sinks_N: Tensor | None = None,
) -> Tensor:
    rest = (cache[2], cache[3], q_start, max_q_len, scale, window, None, None, sinks_N)
    return reference.attention.paged_attention(
        q_TNH.float(), cache[0].float(), cache[1].float(), *rest
    )


def assert_near(actual: Tensor, exact: Tensor) -> None:
    """Zeros must be zeros; elsewhere the bounds of our own kernels."""
    assert not actual.isnan().any()
    assert not actual[(exact == 0).all(-1)].any()
    error = (actual.float() - exact).norm() / exact.norm()
    assert error < TOLERANCE[actual.dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("case", cases(), ids=str)
def test_decode_matches_the_formula(case: Case) -> None:
    for lens in ([1], [19, 0, 99, 989, 255, 256, 257], [4096, 1, 128, 3000]):
        check(case, [(1, max(length - 1, 0)) for length in lens])


@pytest.mark.parametrize("num_rows", [1, 16, 64, 256])
@pytest.mark.parametrize("generation", FOUND)
def test_decode_matches_the_formula_at_each_batch_size(generation: int, num_rows: int) -> None:
    lens = [(1, 37 * row % 1900) for row in range(num_rows)]
    check(plain(generation, (16, 8, 128, 0)), lens)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_prefill_matches_the_formula(case: Case) -> None:
    check(case, PREFILL, tail=37)
    check(case, [(7, 0)])
    check(case, [(1500, 0), (700, 3000)], tail=200)


@pytest.mark.parametrize("generation", FOUND)
def test_empty_rows_and_tokens_of_no_row_give_zeros(generation: int) -> None:
    case = plain(generation, (4, 2, 64, 0))
    check(case, [(19, 0), (0, 0), (5, 60), (0, 0)], tail=200)
    cache = cache_for([99, 0, 5], case)
    # interface 4 wants keys for rows of several queries
    for q_lens in ([1, 1, 1], [3, 2, 4])[: 1 if generation == 4 else 2]:
        q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
        q_TNH = torch.randn(sum(q_lens), 4, 64, device=device).bfloat16()
        compare(generation, q_TNH, cache, q_start, max(q_lens), 0)


@pytest.mark.parametrize("generation", FOUND)
def test_queries_may_be_a_strided_view(generation: int) -> None:
    cache = cache_for([40, 19, 5], plain(generation, (4, 2, 64, 0)))
    qkv = torch.randn(3, 8, 64, device=device).bfloat16()
    q_start = torch.arange(4, dtype=torch.int32, device=device)
    for max_q_len in (1, 3):
        compare(generation, qkv[:, 2:6], cache, q_start, max_q_len, 0)


@pytest.mark.parametrize("generation", FOUND)
@pytest.mark.parametrize("q_lens", [[1, 1, 1, 1], [700, 1, 40, 0]])
def test_a_captured_step_follows_lengths_and_starts(generation: int, q_lens: list[int]) -> None:
    cache = cache_for([2000, 700, 1500, 64], plain(generation, (16, 8, 128, 0)))
    seq_len = cache[3]
    q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
    is_decode, most = max(q_lens) == 1, max(q_lens)
    q_TNH = torch.randn(4 if is_decode else 800, 16, 128, device=device).bfloat16()
    attend = partial(
        ops.ATTENTION[f"flash_attn_{generation}"], q_TNH, *cache, q_start, most, 0.1, 0
    )
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = attend()
    for lens, replayed in (
        ([2000, 700, 1500, 64], q_lens),
        ([1999, 0, 1, 64], [600, 0, 1, 64]),
        ([3, 699, 1500, 63], [3, 699, 7, 5]),
    ):
        seq_len.copy_(torch.tensor(lens))
        if not is_decode:
            q_start.copy_(torch.tensor([0, *replayed]).cumsum(0))
        actual.fill_(float("nan"))
        graph.replay()
        assert_near(actual, expected(q_TNH, cache, q_start, most, 0.1, 0))


@pytest.mark.parametrize("heads", [(64, 8, 64, 128), (8, 2, 128, 0)], ids=str)
@pytest.mark.parametrize("generation", [one for one in FOUND if one == 4])
def test_interface_4_has_sinks(generation: int, heads: Heads) -> None:
    case = plain(generation, heads)
    for rows in (PREFILL, [(1, 988), (1, 0), (1, 98)]):
        q_lens = [new for new, _ in rows]
        cache = cache_for([sum(row) for row in rows], case)
        q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
        q_TNH = torch.randn(sum(q_lens), heads[0], heads[2], device=device).bfloat16()
        sinks_N = torch.randn(heads[0], device=device).bfloat16()
        rest = (q_start, max(q_lens), 0.1, heads[3], None, None)
        actual = ops.ATTENTION["flash_attn_4"](q_TNH, *cache, *rest, sinks_N)
        assert_near(actual, expected(q_TNH, cache, *rest[:4], sinks_N.float()))


@pytest.mark.parametrize("generation", [2, 3, 4])
def test_the_fake_of_other_tests_has_the_real_signatures(generation: int) -> None:
    found = flash_attention.installed(generation)
    if not isinstance(found, Flash):
        pytest.skip(found.why)
    _, fake, _, _ = fake_flash_attn.FAKES[generation]
    for name, function in vars(fake).items():
        if isinstance(function, staticmethod):
            real = parameters(getattr(found.module, name))
            assert parameters(function.__func__) == real, f"{found.name}: {name}"


def parameters(function: object) -> list[tuple[str, object, object]]:
    """Names, kinds and defaults."""
    assert callable(function)
    return [(one.name, one.kind, one.default) for one in _signature(function)]


def _signature(function: object) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())  # type: ignore[arg-type]
