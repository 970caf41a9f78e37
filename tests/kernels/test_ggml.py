"""Products with GGUF's blocks, against gguf's own values of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from nanovllm.kernels import ops
from nanovllm.kernels.reference.ggml import TYPES, halves_of, with_halves
from tests.models.gguf_cases import HALVES, blocks


def drawn(ggml_type: int, rows: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks with any codes, and their real values."""
    kind = gguf.GGMLQuantizationType(ggml_type)
    if kind.name in HALVES:
        raw = blocks((rows, depth), kind.name, 0)
    else:
        values = np.random.default_rng(0).standard_normal((rows, depth)).astype(np.float32)
        raw = gguf.quants.quantize(values, kind)
    return torch.from_numpy(raw), torch.from_numpy(dequantize(raw, kind))


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("ggml_type", TYPES)
def test_products_are_those_of_the_real_values(ggml_type: int, num_blocks: int) -> None:
    depth = num_blocks * TYPES[ggml_type].columns
    block, real = drawn(ggml_type, 19, depth)
    x, bias, residual = torch.randn(5, depth), torch.randn(19), torch.randn(5, 19)
    found = ops.ggml_linear(x, block, ggml_type, bias, residual)
    torch.testing.assert_close(found, x @ real.T + bias + residual, rtol=1e-5, atol=1e-4)
    expert = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]], dtype=torch.int32)
    both, reals = torch.stack((block, block.flip(0))), torch.stack((real, real.flip(0)))
    found = ops.ggml_expert_linear(x, expert, both, ggml_type)
    expected = torch.einsum("td,tkod->tko", x, reals[expert.long()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_rows_of_a_table_are_its_real_values(ggml_type: int) -> None:
    block, real = drawn(ggml_type, 19, 2 * TYPES[ggml_type].columns)
    row_T = torch.tensor([18, 0, 7])
    found = ops.ggml_lookup(row_T, block, ggml_type, torch.float32)
    torch.testing.assert_close(found, real[row_T], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_sums_are_rounded_once(ggml_type: int) -> None:
    block, real = drawn(ggml_type, 7, 256)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    found = ops.ggml_linear(x, block, ggml_type, None)
    assert torch.equal(found, (x.float() @ real.T).bfloat16())


@pytest.mark.parametrize("ggml_type", TYPES)
def test_values_are_proportional_to_the_numbers_in_fp16(ggml_type: int) -> None:
    block, real = drawn(ggml_type, 3, 512)
    twice = with_halves(block, ggml_type, halves_of(block, ggml_type) * 2)
    assert torch.equal(ops.ggml_linear(torch.eye(512), twice, ggml_type, None).T, 2 * real)
