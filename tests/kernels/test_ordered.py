"""Triton kernels of deterministic engines: right, and the same bits in any step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from nanovllm.kernels import order, reference
from nanovllm.kernels.triton import ordered_library
from nanovllm.kernels.triton.norm_act import rms_norm
from nanovllm.kernels.triton.ordered_attention import OrderedTile, ordered_attention
from nanovllm.kernels.triton.ordered_experts import ordered_experts
from nanovllm.kernels.triton.ordered_gemm import OrderedTile as GemmTile
from nanovllm.kernels.triton.ordered_gemm import ordered_linear
from scripts.bench.ordered_tiles import FEW_ROW_TILES
from tests.kernels.paged import assert_close, device, paged_cache

# the interpreter does not round to bf16 as GPUs do
DTYPE = torch.bfloat16 if device == "cuda" else torch.float16
LENGTHS = [1, 64, 65, 256, 257, 600]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize(("window", "num_heads", "block_size"), [(0, 4, 64), (100, 2, 16)])
def test_attention_of_decode_steps_and_of_prompts(
    window: int, num_heads: int, block_size: int
) -> None:
    """A query's result has the same bits for any number of workers and in a prompt's step, whatever
    shares its tile."""
    lengths = [*LENGTHS, 0]
    cache = paged_cache(lengths, 2, 32, block_size, DTYPE, window)
    q_RNH = torch.randn(len(lengths), num_heads, 32, device=device).to(DTYPE)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    rest = (starts, 1, 32**-0.5, window)
    first = ordered_attention(q_RNH, *cache, *rest)
    exact = (cache[0].float(), cache[1].float(), *cache[2:])
    assert_close(first, reference.attention.paged_attention(q_RNH.float(), *exact, *rest).to(DTYPE))
    for workers in (1, 2):
        again = ordered_attention(q_RNH, *cache, *rest, launch=OrderedTile(workers, 2))
        assert same_bits(first, again), f"{workers} workers"
    # the same queries as the last of chunks of other lengths
    keys, values = (one.nan_to_num(0.5) if window else one for one in cache[:2])
    for chunk in (2, 40):
        sizes = [min(chunk, length) for length in lengths]
        ends = torch.tensor([0, *sizes]).cumsum(0)
        q_TNH = torch.randn(int(ends[-1]) + 3, num_heads, 32, device=device).to(DTYPE)
        q_TNH[ends[1:-1] - 1] = q_RNH[:-1]
        spans = ends.to(device, torch.int32)
        prompt = ordered_attention(
            q_TNH, keys, values, *cache[2:], spans, max(2, chunk), 32**-0.5, window
        )
        assert same_bits(first[:-1], prompt[ends[1:-1] - 1]), f"chunks of {chunk}"


def test_attention_over_fp8() -> None:
    """The same with keys and values in fp8, whose scales differ between heads."""
    k, v, table, lengths = paged_cache([65, 257, 300], 2, 32, 64, torch.float32)
    scales = torch.tensor([0.5, 2.0], device=device), torch.tensor([1.5, 0.25], device=device)
    k, v = (reference.rope_store.to_fp8(one.flatten(0, 1).nan_to_num(), scale).view_as(one)
            for one, scale in zip((k, v), scales, strict=True))  # fmt: skip
    q_TNH = torch.randn(6, 4, 32, device=device).to(DTYPE)
    starts = torch.tensor([0, 1, 4, 6], dtype=torch.int32, device=device)
    rest = (32**-0.5, 0, *scales)
    prompt = ordered_attention(q_TNH, k, v, table, lengths, starts, 3, *rest)
    assert_close(prompt, reference.attention.paged_attention(
        q_TNH.float(), k, v, table, lengths, starts, 3, *rest).to(DTYPE))  # fmt: skip
    ones = torch.arange(4, dtype=torch.int32, device=device)
    for workers in (1, 3):
        step = ordered_attention(
            q_TNH[[0, 3, 5]], k, v, table, lengths, ones, 1, *rest, launch=OrderedTile(workers, 2)
        )
        assert same_bits(step, prompt[[0, 3, 5]]), f"{workers} workers"


TILES = {
    8: GemmTile(8, 64, 64, 2, 4), 16: GemmTile(16, 64, 64, 2, 4),
    "split": GemmTile(16, 64, 64, 2, 4, splits=True), 32: GemmTile(32, 128, 64, 2, 4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("num_lines", "depth", "silu_mul"), [(96, 600, False), (64, 256, True), (200, 72, False)]
)
def test_products(num_lines: int, depth: int, silu_mul: bool) -> None:
    """Right for any tile and number of rows, and the same bits for one row as among others."""
    x_TD = torch.randn(35, depth, device=device).to(DTYPE)
    weight_OD = (torch.randn(num_lines, depth, device=device) / depth**0.5).to(DTYPE)
    bias_O = torch.randn(num_lines, device=device).to(DTYPE)
    residual_TO = None
    if not silu_mul:
        residual_TO = torch.randn(35, num_lines, device=device).to(DTYPE)
    exact = reference.ordered.ordered_linear(
        x_TD.float(), weight_OD.float(), bias_O.float(),
        None if residual_TO is None else residual_TO.float(), silu_mul,
    )  # fmt: skip
    has_shares = order.shares_of(num_lines, depth).number > 1
    found = []
    for tile in (None, *TILES.values()):
        if tile is not None and tile.splits and not has_shares:
            continue
        for num_rows in (1, 35):
            rest = None if residual_TO is None else residual_TO[:num_rows]
            y_TO = ordered_linear(x_TD[:num_rows], weight_OD, bias_O, rest, silu_mul, launch=tile)
            assert_close(y_TO, exact[:num_rows].to(DTYPE))
            found.append(y_TO[0])
    if device == "cuda":  # the interpreter's products follow the library of NumPy
        assert all(same_bits(found[0], one) for one in found)


@pytest.mark.parametrize("depth", [64, 200, 4096])
def test_norms(depth: int) -> None:
    """A row has the same bits among any rows: they share a kernel, whose tile is by the depth."""
    x_TD = torch.randn(40, depth, device=device).to(DTYPE)
    norm_D = (torch.rand(depth, device=device) + 0.5).to(DTYPE)
    normed_TD = rms_norm(x_TD, norm_D, 1e-6)
    for first, end in ((3, 4), (38, 40), (1, 24)):
        assert same_bits(normed_TD[first:end], rms_norm(x_TD[first:end], norm_D, 1e-6))


def chain_of_products(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    """`tl.dot` of the interpreter as a chain along the depth, in place of NumPy's product, whose
    order follows its library. Each number of the result has its own chain."""
    total = d.data.astype(np.float32)
    for k in range(a.data.shape[1]):
        total = total + a.data[:, k, None].astype(np.float32) * b.data[k].astype(np.float32)
    return interpreter.TensorHandle(total, d.dtype.scalar)


@pytest.mark.parametrize(("num_lines", "silu_mul"), [(128, True), (64, False)])
def test_tiles_of_few_rows_and_of_many(
    num_lines: int, silu_mul: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile of one row and of few has the sums of those of many, which do not split."""
    if device == "cpu":
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", chain_of_products)
    depth = 264
    assert order.shares_of(num_lines, depth).number == 2
    x_TD = torch.randn(256, depth, device=device).to(DTYPE)
    weight_OD = (torch.randn(num_lines, depth, device=device) / depth**0.5).to(DTYPE)
    rest = None, None, silu_mul
    many = GemmTile(64, 128, 64, 4, 4)
    expected = ordered_linear(x_TD, weight_OD, *rest, launch=many)
    for tile in FEW_ROW_TILES:
        one = ordered_linear(x_TD[:1], weight_OD, *rest, launch=tile)
        assert same_bits(one, expected[:1]), tile
    for num_rows in (16, 64):
        tile = FEW_ROW_TILES[0]
        few = ordered_linear(x_TD[:num_rows], weight_OD, *rest, launch=tile)
        assert same_bits(few, expected[:num_rows]), num_rows


def test_experts_of_one_token_and_of_many() -> None:
    x_TD = torch.randn(40, 96, device=device).to(DTYPE)
    gate_up_EGD = (torch.randn(6, 2 * 40, 96, device=device) / 96**0.5).to(DTYPE)
    down_EDF = (torch.randn(6, 96, 40, device=device) / 40**0.5).to(DTYPE)
    weight_TK, expert_TK = torch.randn(40, 6, device=device).softmax(1).topk(3)
    rest = (weight_TK, expert_TK.int(), gate_up_EGD, down_EDF, x_TD)
    exact = reference.experts.experts(
        x_TD.float(), *rest[:2], gate_up_EGD.float(), down_EDF.float(), x_TD.float()
    )
    many = ordered_experts(x_TD, *rest)
    assert_close(many, exact.to(DTYPE))
    for token in (0, 39):
        part = slice(token, token + 1)
        one = ordered_experts(
            x_TD[part], weight_TK[part], expert_TK[part].int(), *rest[2:4], x_TD[part]
        )
        assert_close(one, exact[part].to(DTYPE))
        if device == "cuda":
            assert same_bits(one, many[part])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_lines", "depth", "silu_mul"),
    [(4096, 1024, False), (1024, 3072, False), (24576, 4096, True), (4096, 12288, False)],
)
def test_products_of_qwen3(num_lines: int, depth: int, silu_mul: bool) -> None:
    """One row has the same bits among any number of rows, by the tiles that are chosen."""
    x_TD = torch.randn(1100, depth, device=device).to(DTYPE)
    weight_OD = (torch.randn(num_lines, depth, device=device) / depth**0.5).to(DTYPE)
    rest = (weight_OD, None, None, silu_mul)
    first = ordered_linear(x_TD[:1], *rest)
    exact = reference.ordered.ordered_linear(x_TD[:1], *rest)
    assert_close(first, exact)
    for num_rows in (2, 16, 17, 33, 64, 100, 128, 130, 200, 256, 300, 1100):
        assert same_bits(first, ordered_linear(x_TD[:num_rows], *rest)[:1]), num_rows
    # cuBLAS is taken where it has the same bits, which it has for the largest
    agrees = {one.num_rows: agree for one, agree in ordered_library._agrees.items()
              if (one.num_lines, one.depth) == (num_lines, depth)}  # fmt: skip
    assert agrees.get(1100, False) == (order.shares_of(num_lines, depth).number == 1)
