"""Kernels of deterministic engines on a CPU, with packed weights and adapters too: a row has the
same bits among any number of rows, and adapters in any slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cpu import ordered, packed

DEPTH, OUTPUTS, TOKENS = 256, 48, 130


@pytest.fixture(params=[False, True], ids=["int8 inputs", "exact inputs"])
def _inputs(request: pytest.FixtureRequest) -> Iterator[None]:
    before = packed.are_exact()
    packed.configure(request.param)
    yield
    packed.configure(before)


def products(group: int) -> Iterator[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """The products of codes with scales, with offsets too, and by a table, and that of fp8; each
    with its plain one."""
    code = torch.randint(0, 256, (OUTPUTS, DEPTH // 2), dtype=torch.uint8)
    scale, offset = (torch.rand(OUTPUTS, DEPTH // group) + 0.1 for _ in range(2))
    for rest in ((None, None), (offset, None), (None, torch.randn(16))):
        args = (code, scale, *rest, 4, group, None)
        yield (
            lambda x, args=args: ordered.ordered_packed_linear(x, *args),
            lambda x, args=args: packed.packed_linear(x, *args),
        )
    of_fp8 = (torch.randn(OUTPUTS, DEPTH).to(torch.float8_e4m3fn), scale[:3], 16, group, None)
    yield (
        lambda x: ordered.ordered_fp8_linear(x, *of_fp8),
        lambda x: packed.fp8_linear(x, *of_fp8),
    )


def differs(product: Callable[[Tensor], Tensor], x_TD: Tensor) -> bool:
    expected = product(x_TD)
    return any(
        not torch.equal(product(x_TD[row : row + num]), expected[row : row + num])
        for row in (0, 5)
        for num in (1, 3, 9, 17, 65)
    )


@pytest.mark.usefixtures("_inputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights(dtype: torch.dtype) -> None:
    x_TD = torch.randn(TOKENS, DEPTH).to(dtype)
    plain_differs = 0
    for group in (32, 128):
        for product, plain in products(group):
            assert not differs(product, x_TD)
            bound = float(plain(x_TD).abs().max()) * (1e-5 if dtype is torch.float32 else 0.02)
            assert float((product(x_TD) - plain(x_TD)).abs().max()) <= bound
            plain_differs += differs(plain, x_TD)
    # without the option bits follow the number of rows, but where bf16 hides it
    assert plain_differs or (packed.are_exact() and dtype is torch.bfloat16)


@pytest.mark.parametrize("ggml_type", [6, 7, 10, 11, 13, 14])
def test_blocks_of_gguf_files(ggml_type: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, x_TD = reference.ggml.TYPES[ggml_type], torch.randn(TOKENS, 2 * 256)
    size = x_TD.shape[1] // kind.columns * kind.num_bytes
    block_OB = torch.randint(0, 50, (OUTPUTS, size), dtype=torch.uint8)
    args = (block_OB, ggml_type, None)
    monkeypatch.setattr(packed._State, "exact", True)
    with pytest.raises(ValueError, match="NANOVLLM_EXACT_INPUTS"):
        ordered.ordered_ggml_linear(x_TD, *args)
    exact = reference.ggml.ggml_linear(x_TD, *args)
    monkeypatch.setattr(packed._State, "exact", False)
    found = ordered.ordered_ggml_linear(x_TD, *args)
    assert float((found - exact).norm() / exact.norm()) < 0.02
    assert not differs(lambda x: ordered.ordered_ggml_linear(x, *args), x_TD)


def test_adapters_in_other_slots_and_among_others() -> None:
    rank, rows = 6, [16, 32]
    x_TD, y_TO = torch.randn(40, DEPTH), torch.randn(40, 48)
    a_NLD, b_NOR = torch.randn(3, 2 * rank, DEPTH), torch.randn(3, 48, rank)
    adapter_T = torch.randint(0, 4, (40,))
    adapter_T[7] = 2
    tiles = reference.lora.adapter_tiles(adapter_T)
    found = ordered.ordered_add_lora(y_TO, x_TD, adapter_T, *tiles, a_NLD, b_NOR, rows)
    plain = reference.lora.add_lora(y_TO, x_TD, adapter_T, *tiles, a_NLD, b_NOR, rows)
    torch.testing.assert_close(found, plain, atol=1e-3, rtol=1e-4)
    for slot in range(3):
        one = torch.tensor([slot + 1])
        a, b = a_NLD.roll(slot - 1, 0), b_NOR.roll(slot - 1, 0)
        alone = ordered.ordered_add_lora(
            y_TO[7:8], x_TD[7:8], one, *reference.lora.adapter_tiles(one), a, b, rows
        )
        assert torch.equal(alone, found[7:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_chunks_of_any_size(dtype: torch.dtype) -> None:
    """A query has the same bits wherever its chunk begins and ends: in tiles of all sizes."""
    length, block = 130, 16
    blocks = -(-length // block)
    cache_CBKH = torch.randn(2, blocks, block, 2, 32).to(dtype)
    q_TNH = torch.randn(length, 4, 32).to(dtype)
    table = torch.randperm(blocks).int().view(1, -1)

    def attention(first: int, end: int) -> Tensor:
        lengths, starts = torch.tensor([end]).int(), torch.tensor([0, end - first]).int()
        return ordered.ordered_attention(
            q_TNH[first:end], *cache_CBKH, table, lengths, starts, end - first, 32**-0.5, 0
        )

    expected = attention(0, length)
    for first in range(0, length, 9):
        for size in (1, 2, 3, 5, 8, 15, 16, 31, 64):
            end = min(first + size, length)
            assert torch.equal(attention(first, end), expected[first:end]), (first, end)
