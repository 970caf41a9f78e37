"""Attention within segments in Triton against the formula, with NaN outside the segments."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.triton.varlen_attention import (
    VarlenTile,
    head_parts,
    varlen_attention,
    varlen_tile,
)
from tests.kernels.paged import assert_close, device
from tests.kernels.varlen_cases import SCALE, STARTS, exact, inputs

KB = 1024
# segments that begin and end anywhere in tiles of 64; many empty ones behind, as in a padded call
MORE = [[0, 63, 64, 193], [0, 65, 65, 66, 130], [0, 128, *[150] * 40], [0, 16, 80, 96, 100, 164]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(
    starts: list[int],
    padding: int = 13,
    dtype: torch.dtype = torch.float32,
    num_heads: int = 2,
    head_dim: int = 24,
    max_len: int = 200,
    tile: VarlenTile | None = None,
) -> None:
    q, k, v, start_S = inputs(starts, padding, dtype, device, num_heads, head_dim)
    out = varlen_attention(q, k, v, start_S, max_len, SCALE, tile)
    assert out.shape == q.shape and out.dtype == dtype
    assert_close(out[starts[0] : starts[-1]].cpu(), exact(q, k, v, starts))
    assert not out[starts[-1] :].any()  # zeros, not NaN


@pytest.mark.parametrize("starts", STARTS + MORE, ids=str)
@pytest.mark.parametrize("padding", [0, 13, 150])
def test_tokens_see_their_segment_alone(starts: list[int], padding: int) -> None:
    check(starts, padding)


@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 72, 80, 96, 104, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_any_size_are_attended_whole(head_dim: int, dtype: torch.dtype) -> None:
    check([0, 19, 83], dtype=dtype, num_heads=1, head_dim=head_dim)
    check([0, 64, 128], dtype=dtype, num_heads=1, head_dim=head_dim, max_len=64)


@pytest.mark.parametrize(
    "tile", [VarlenTile(16, 32, 4, 2), VarlenTile(128, 64, 8, 3), VarlenTile(64, 128, 4, 2)]
)
def test_every_tile_gives_the_same(tile: VarlenTile) -> None:
    for starts in (STARTS[3], *MORE[:2]):
        check(starts, tile=tile, num_heads=1, head_dim=80)


@pytest.mark.parametrize("num_heads", [1, 3, 16])
def test_heads_do_not_mix(num_heads: int) -> None:
    check([0, 19, 99], num_heads=num_heads)


def test_queries_keys_and_values_may_have_strides_of_their_own() -> None:
    q, k, v, start_S = inputs([0, 19, 99], 5, torch.float32, device)
    out = varlen_attention(q.contiguous(), k.mT.contiguous().mT, v, start_S, 99, SCALE)
    assert_close(out[:99].cpu(), exact(q, k, v, [0, 19, 99]))


def test_a_nan_stays_in_its_segment() -> None:
    """Pictures of several requests share a call."""
    starts = [0, 50, 70, 131]
    q, k, v, start_S = inputs(starts, 0, torch.float32, device)
    expected = exact(q, k, v, starts)
    for x in (q, k, v):
        x[50:70] = torch.nan
    out = varlen_attention(q, k, v, start_S, 200, SCALE).cpu()
    assert out[50:70].isnan().all()
    for begin, end in ((0, 50), (70, 131)):
        assert_close(out[begin:end], expected[begin:end])


def test_large_scores_do_not_overflow() -> None:
    q, k, v, start_S = inputs([0, 19, 99], 0, torch.float32, device)
    q = q * 100
    out = varlen_attention(q, k, v, start_S, 99, SCALE)
    assert_close(out.cpu(), exact(q, k, v, [0, 19, 99]))


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)),
     (80, (64, 16)), (88, (64, 32)), (96, (64, 32)), (104, (128, 0)), (128, (128, 0))],
)  # fmt: skip
def test_heads_are_padded_by_as_little_as_powers_of_two_allow(
    head_dim: int, parts: tuple[int, int]
) -> None:
    assert head_parts(head_dim) == parts


def test_windows_and_small_gpus_have_small_tiles() -> None:
    assert varlen_tile(80, 2, 64, 227 * KB).queries == 64
    assert varlen_tile(80, 2, 4096, 227 * KB).queries == 128
    assert varlen_tile(80, 2, 4096, 99 * KB).queries == 64


def test_unsupported_heads_and_scales_are_refused() -> None:
    q, k, v, start_S = inputs([0, 19], 0, torch.float32, device, head_dim=136)
    with pytest.raises(ValueError, match="heads have 136 numbers: at most 128"):
        varlen_attention(q, k, v, start_S, 19, SCALE)
    with pytest.raises(ValueError, match=r"scale must be positive, got 0\.0"):
        varlen_attention(q[..., :8], k[..., :8], v[..., :8], start_S, 19, 0.0)


def test_no_tokens_give_nothing() -> None:
    q, k, v, start_S = inputs([0, 0], 0, torch.float32, device)
    assert varlen_attention(q, k, v, start_S, 19, SCALE).shape == q.shape


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_segments_on_a_gpu(head_dim: int, dtype: torch.dtype) -> None:
    check([0, 989, 990, 4096, *[5476] * 14], 668, dtype, 4, head_dim, 5476)
    check([0, *range(16, 6000, 64), *[6000] * 30], 144, dtype, 4, head_dim, 64)


@pytest.mark.gpu
def test_a_captured_launch_follows_the_starts() -> None:
    """One graph is replayed with other segments."""
    layouts = ([0, 989, *[989] * 15], [0, 1, 64, *[999] * 14], list(range(0, 17 * 60, 60)))
    q, k, v, _ = inputs([0, 1024], 0, torch.bfloat16, device, 4, 64)
    start_S = torch.zeros(17, dtype=torch.int32, device=device)
    varlen_attention(q, k, v, start_S, 1024, SCALE)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = varlen_attention(q, k, v, start_S, 1024, SCALE)
    for starts in layouts:
        start_S.copy_(torch.tensor(starts))
        graph.replay()
        assert_close(out[: starts[-1]].cpu(), exact(q, k, v, starts))
