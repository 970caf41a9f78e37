"""Codes of 4 and 8 bits, and products with them, against their formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nanovllm.kernels import dequantized, ops, reference
from nanovllm.kernels.cpu import packed as cpu_packed
from nanovllm.kernels.reference.packed import pack, unpack

ROUNDING = 2.0**-22  # of a sum in fp32 and of its terms, relative to the sum of their magnitudes
TABLE = torch.linspace(-1.0, 1.0, 16)


@pytest.fixture(autouse=True)
def _exact_inputs() -> Iterator[None]:
    """On a CPU ops may have kernels, if an earlier test has made an engine."""
    before = cpu_packed.are_exact()
    cpu_packed.configure(exact=True)
    yield
    cpu_packed.configure(exact=before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("depth", [1, 19, 32, 99])
def test_unpacked_codes_are_those_that_were_packed(bits: int, depth: int) -> None:
    code = torch.randint(2**bits, (3, 5, depth), dtype=torch.uint8)
    packed = pack(code, bits)
    assert packed.shape[-1] == (depth if bits == 8 else -(-depth // 32) * 16)
    assert torch.equal(unpack(packed, bits)[..., :depth], code)


def test_codes_of_4_bits_are_in_the_order_of_gguf() -> None:
    code = torch.arange(32, dtype=torch.uint8) % 16
    code[16:] = 5
    assert torch.equal(pack(code, 4), torch.arange(16, dtype=torch.uint8) | (5 << 4))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("depth, group", [(19, 19), (64, 16), (96, 32), (99, 128)])
def test_products_are_those_of_the_real_values(
    bits: int, has_offset: bool, depth: int, group: int
) -> None:
    num_groups = -(-depth // group)
    code = torch.randint(2**bits, (2, 7, depth), dtype=torch.uint8)
    scale = torch.randn(2, 7, num_groups)
    offset = torch.randn(2, 7, num_groups) if has_offset else None
    table = TABLE if bits == 4 else None
    column = torch.arange(depth)
    level = TABLE[code.long()] if bits == 4 else code.float()
    real = level * scale[..., column // group]
    real = real if offset is None else real + offset[..., column // group]
    x, bias, residual = torch.randn(5, depth), torch.randn(7), torch.randn(5, 7)
    one = (pack(code, bits)[0], scale[0], None if offset is None else offset[0], table)
    found = ops.packed_linear(x, *one, bits, group, bias, residual)
    terms = x.abs() @ real[0].abs().T
    expected = (x.double() @ real[0].double().T + bias + residual).float()
    assert ((found - expected).abs() <= ROUNDING * terms + 1e-5).all()
    expert = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]], dtype=torch.int32)
    found = ops.packed_expert_linear(x, expert, pack(code, bits), scale, offset, table, bits, group)
    chosen = real[expert.long()]
    terms = torch.einsum("td,tkod->tko", x.abs(), chosen.abs())
    expected = torch.einsum("td,tkod->tko", x.double(), chosen.double()).float()
    assert ((found - expected).abs() <= ROUNDING * terms + 1e-5).all()


@pytest.mark.parametrize("rows, columns", [(128, 128), (1, 99), (2, 32)])
def test_products_of_fp8_are_those_of_the_real_values(rows: int, columns: int) -> None:
    weight = torch.randn(2, 7, 99).to(torch.float8_e4m3fn)
    scale = torch.rand(2, -(-7 // rows), -(-99 // columns))
    o, d = torch.arange(7) // rows, torch.arange(99) // columns
    real = weight.float() * scale[:, o][:, :, d]
    x = torch.randn(5, 99)
    found = ops.fp8_linear(x, weight[0], scale[0], rows, columns, None)
    torch.testing.assert_close(found, x @ real[0].T, rtol=1e-5, atol=1e-4)
    assert torch.equal(reference.packed.of_fp8(weight, scale, rows, columns), real)
    expert = torch.tensor([[0, 1]] * 5, dtype=torch.int32)
    found = ops.fp8_expert_linear(x, expert, weight, scale, rows, columns)
    expected = torch.einsum("td,tkod->tko", x, real[expert.long()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_products_by_real_values_are_those_of_the_ops() -> None:
    """Those of `dequantized`, for weights that a device's kernels do not take."""
    code, scale, offset = (
        torch.randint(16, (2, 7, 64), dtype=torch.uint8), torch.randn(2, 7, 2), torch.randn(2, 7, 2)
    )  # fmt: skip
    x, bias, residual = torch.randn(5, 64), torch.randn(7), torch.randn(5, 7)
    expert = torch.tensor([[0, 1]] * 5, dtype=torch.int32)
    packed = pack(code, 4)
    fp8, fp8_scale = torch.randn(2, 7, 64).to(torch.float8_e4m3fn), torch.rand(2, 1, 1)
    last = (bias, residual)
    cases: dict[str, tuple[Any, ...]] = {
        "packed_linear": (x, packed[0], scale[0], offset[0], None, 4, 32, *last),
        "packed_expert_linear": (x, expert, packed, scale, offset, None, 4, 32),
        "fp8_linear": (x, fp8[0], fp8_scale[0], 128, 128, *last),
        "fp8_expert_linear": (x, expert, fp8, fp8_scale, 128, 128),
    }
    for name, case in cases.items():
        expected = reference.meaning(name)(*case)
        assert expected.isfinite().all()
        found = vars(dequantized)[name](*case)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
