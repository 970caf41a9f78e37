"""All backends of paged attention agree with the formula.

They get the same pages, lengths, heads and windows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import flash_attention, ops, reference
from nanovllm.kernels import sdpa as sdpa_attention
from tests.kernels import fake_flash_attn
from tests.kernels.paged import assert_close, device, exact_attention, paged_cache

BACKENDS = ["reference", "triton", "sdpa", "flash1", "flash2", "flash3", "flash4"]
if not importlib.util.find_spec("triton"):
    BACKENDS.remove("triton")
SDPA = ops.ATTENTION["sdpa"]
FLASH = [op for key, op in ops.ATTENTION.items() if key.startswith("flash_attn")]
# (query heads, key-value heads, head size, window): groups of 1 to 16
HEADS = [
    (1, 1, 64, 0),
    (4, 4, 80, 19),
    (16, 1, 96, 0),
    (14, 2, 64, 1),
    (16, 2, 128, 100),
    (4, 1, 256, 0),
    (2, 2, 256, 5000),
]
# (new tokens, tokens in the cache before them)
DECODE = [(1, 0), (1, 18), (1, 98), (1, 988), (1, 255), (1, 256)]
PREFILL = [(1, 0), (19, 99), (0, 0), (99, 0), (89, 900), (2, 17)]


@pytest.fixture
def run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Tensor]]:
    """The backend's function. flash-attn is a fake that refuses what is not documented."""
    name: str = request.param
    if name.startswith("flash"):
        fake_flash_attn.install(monkeypatch, int(name[-1]))
        yield ops.ATTENTION[f"flash_attn_{name[-1]}"]
        flash_attention._loaded.cache_clear()
    elif name == "triton":
        from nanovllm.kernels.triton import register as triton_kernels

        yield triton_kernels.paged_attention
    else:
        yield {"reference": reference.attention.paged_attention, "sdpa": SDPA}[name]


def check(
    run: Callable[..., Tensor],
    rows: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    *,
    block_size: int = 256,
    dtype: torch.dtype = torch.float16,
    padding: tuple[int, int] = (0, 0),
    max_q_len: int | None = None,
) -> None:
    """`padding`: numbers of tokens, all NaN, before the first row and after the last."""
    num_heads, num_kv_heads, head_dim, window = heads
    before, after = padding
    q_lens = [new for new, _ in rows]
    # keys before a decode step's window are NaN, except for flash-attn, which does not promise to
    # skip keys that a row owns
    unseen = window if max(q_lens) == 1 and run not in FLASH else 0
    k_cache, v_cache, table, seq_len = paged_cache(
        [sum(row) for row in rows], num_kv_heads, head_dim, block_size, dtype, unseen
    )
    q_start = torch.tensor([before, *q_lens], device=device).cumsum(0).int()
    q_TNH = torch.randn(before + sum(q_lens) + after, num_heads, head_dim, device=device).to(dtype)
    q_TNH[:before], q_TNH[before + sum(q_lens) :] = float("nan"), float("nan")
    cache, scale = (k_cache, v_cache, table, seq_len, q_start), head_dim**-0.5
    actual = run(q_TNH, *cache, max_q_len or max(q_lens), scale, window)
    assert actual.dtype == dtype
    assert_close(actual, exact_attention(q_TNH, *cache, scale, window))


def fits(name: str, head_dim: int, window: int) -> bool:
    return name != "flash1" or (head_dim <= 128 and window == 0)


CASES = [(name, heads) for name in BACKENDS for heads in HEADS if fits(name, heads[2], heads[3])]


@pytest.mark.parametrize(("run", "heads"), CASES, indirect=["run"])
def test_decode_matches_the_formula(
    run: Callable[..., Tensor], heads: tuple[int, int, int, int]
) -> None:
    check(run, DECODE, heads)


@pytest.mark.parametrize(("run", "heads"), CASES, indirect=["run"])
def test_prefill_matches_the_formula(
    run: Callable[..., Tensor], heads: tuple[int, int, int, int]
) -> None:
    check(run, PREFILL, heads)


@pytest.mark.parametrize("run", BACKENDS, indirect=True)
def test_tokens_of_no_row_and_empty_rows_give_zeros(run: Callable[..., Tensor]) -> None:
    check(run, [(19, 0), (0, 0), (5, 60)], (4, 2, 64, 0), padding=(0, 200), max_q_len=224)
    check(run, [(0, 0), (0, 0)], (4, 2, 64, 0), padding=(0, 19), max_q_len=19)
    check(run, [(9, 0)], (4, 2, 64, 0), padding=(70, 3), max_q_len=82)


@pytest.mark.parametrize("run", BACKENDS, indirect=True)
def test_a_row_without_keys_gives_zeros(run: Callable[..., Tensor]) -> None:
    k_cache, v_cache, table, seq_len = paged_cache([99, 0, 5], 2, 64, 256, torch.float16)
    # interface 4 wants keys for rows of several queries
    for q_lens in ([1, 1, 1], [3, 2, 4])[: 1 if run is ops.ATTENTION["flash_attn_4"] else 2]:
        q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
        q_TNH = torch.randn(sum(q_lens), 4, 64, device=device).half()
        cache = (k_cache, v_cache, table, seq_len, q_start)
        actual = run(q_TNH, *cache, max(q_lens), 0.125, 0)
        assert not actual[q_start[1] : q_start[2]].any()
        assert_close(actual, exact_attention(q_TNH, *cache, 0.125, 0))


@pytest.mark.parametrize("run", BACKENDS, indirect=True)
def test_queries_may_be_a_strided_view(run: Callable[..., Tensor]) -> None:
    k_cache, v_cache, table, seq_len = paged_cache([40, 19, 5], 2, 64, 256, torch.bfloat16)
    qkv = torch.randn(3, 8, 64, device=device).bfloat16()
    cache = (k_cache, v_cache, table, seq_len, torch.arange(4, dtype=torch.int32, device=device))
    for max_q_len in (1, 3):
        actual = run(qkv[:, 2:6], *cache, max_q_len, 0.125, 0)
        assert_close(actual, exact_attention(qkv[:, 2:6], *cache, 0.125, 0))


@pytest.mark.parametrize("run", ["sdpa", "flash1", "flash3", "flash4"], indirect=True)
def test_pages_may_be_small(run: Callable[..., Tensor]) -> None:
    check(run, DECODE, (4, 2, 64, 0), block_size=16)
    check(run, PREFILL, (4, 2, 64, 0), block_size=16)


@pytest.mark.parametrize("heads", [(16, 2, 128, 0), (7, 7, 64, 0), (16, 1, 64, 0)])
def test_a_build_without_small_pages_reads_whole_tiles(
    heads: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_flash_attn.install_wheel(monkeypatch)
    run = ops.ATTENTION["flash_attn_3"]
    for rows in (DECODE, PREFILL, [(3, 5), (2, 700)]):
        check(
            run,
            rows,
            heads,
            block_size=128,
            dtype=torch.bfloat16,
            padding=(0, 0 if rows == DECODE else 19),
        )
    flash_attention._loaded.cache_clear()


@pytest.mark.parametrize("run", ["flash4"], indirect=True)
@pytest.mark.parametrize("window", [0, 100])
def test_interface_4_has_sinks(run: Callable[..., Tensor], window: int) -> None:
    for rows in (DECODE, PREFILL):
        q_lens = [new for new, _ in rows]
        cache = paged_cache([sum(row) for row in rows], 2, 64, 16, torch.float16)
        q_start = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
        q_TNH = torch.randn(sum(q_lens), 8, 64, device=device).half()
        sinks_N = torch.randn(8, device=device).half()
        actual = run(q_TNH, *cache, q_start, max(q_lens), 0.125, window, None, None, sinks_N)
        assert_close(actual, exact_attention(q_TNH, *cache, q_start, 0.125, window, sinks_N))


@pytest.mark.parametrize("window", [0, 100])
def test_sdpa_in_pieces_gives_the_same_result(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa_attention, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(sdpa_attention, "QUERY_TOKENS", 7)
    for rows in (DECODE, PREFILL):
        check(SDPA, rows, (4, 2, 64, window), block_size=16, dtype=torch.float32)


def test_the_ops_trace_with_their_shapes_and_are_not_inlined() -> None:
    with torch._subclasses.FakeTensorMode():
        q_TNH, cache = torch.empty(3, 4, 64), torch.empty(9, 16, 2, 64)
        table, seq_len, q_start = (
            torch.empty(*shape, dtype=torch.int32) for shape in ((3, 2), (3,), (4,))
        )
        for op in filter(ops.op_name, ops.ATTENTION.values()):
            assert (
                op(q_TNH, cache, cache, table, seq_len, q_start, 1, 0.125, 0).shape == q_TNH.shape
            )


def found(capability: tuple[int, int], *, is_nvidia: bool = True) -> list[int]:
    return [flash.generation for flash in flash_attention.find(capability, is_nvidia=is_nvidia)[0]]


def test_the_gpu_decides_which_flash_attn_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for generation, (_, _, version, capability) in fake_flash_attn.FAKES.items():
        fake_flash_attn.install(monkeypatch, generation)
        (flash,), _ = flash_attention.find(capability)
        assert (flash.generation, flash.version) == (generation, version)
    fake_flash_attn.install(monkeypatch, 2)
    fake_flash_attn.add(monkeypatch, 4)
    for capability, generations in (
        ((9, 0), [2, 4]),
        ((10, 0), [4, 2]),
        ((12, 0), [2]),
        ((7, 5), []),
        ((7, 0), []),
    ):
        assert found(capability) == generations
    # the capability of an AMD GPU is not an NVIDIA generation
    assert found((9, 4), is_nvidia=False) == [2]


def test_an_old_flash_attn_without_pages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    fake_flash_attn.install(monkeypatch, 2)

    def old(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return q

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_with_kvcache", old)
    _, (missing,) = flash_attention.find((8, 0))
    assert "2.8.3 has no flash_attn_with_kvcache(…, block_table)" in missing.why
