"""Interleaved rows of packed weights on a CPU: products, look-ups and where they are chosen."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import reference
from nanovllm.kernels.cpu import packed
from tests.kernels import test_cpu_packed
from tests.kernels.test_cpu_packed import (
    DTYPES,
    NAN,
    Case,
    _quantized_inputs,
    assert_within,
    case,
    experts_of,
    inputs,
    instructions,
    product,
)

__all__ = ["_quantized_inputs", "instructions"]  # fixtures
pytestmark = test_cpu_packed.pytestmark


def interleaved(one: Case) -> Case:
    code, scale = reference.packed.interleave(one.code, one.scale)
    offset = None if one.offset is None else reference.packed.interleave_groups(one.offset)
    return one._replace(code=code, scale=scale, offset=offset)


@pytest.mark.parametrize("bits, table", [(4, "codes"), (4, "iq4_nl"), (8, "codes")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instructions")
def test_products_of_interleaved_rows(bits: int, table: str, dtype: torch.dtype) -> None:
    """Few rows of x have a product of their own; many have that of rows, as the others do."""
    for depth, group, scale_dtype, has_offset in (
        (96, 32, torch.float32, True),
        (576, 64, torch.float16, False),
        (640, 128, torch.bfloat16, True),
        (416, 416, torch.float16, True),
    ):
        one = case((48, depth), bits, group, table, has_offset, scale_dtype)
        by_16, bias_O = interleaved(one), torch.randn(48).to(dtype)
        for num_rows in (*range(1, 12), 16, 33, 70):
            x_TD = inputs(num_rows, depth).to(dtype)
            residual_TO = torch.randn(num_rows, 48).to(dtype)
            found = product(x_TD, by_16, bias_O)
            if num_rows < 64 or dtype is torch.float32:
                assert_within(found, x_TD, one, bias_O)
            else:
                assert torch.equal(found, product(x_TD, one, bias_O))
            assert torch.equal(product(x_TD, by_16, bias_O, residual_TO), found + residual_TO)
        row_T = torch.tensor([47, 0, 17])
        found = packed.packed_lookup(row_T, *by_16[:6], depth, dtype)
        assert torch.equal(found, packed.packed_lookup(row_T, *one[:6], depth, dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("instructions")
def test_interleaved_rows_of_lossless_inputs_and_of_exact_ones(bits: int) -> None:
    one = case((32, 160), bits, 32)
    by_16 = interleaved(one)
    for num_rows in (1, 3, 9):
        x_TD = inputs(num_rows, 160, is_lossless=True)
        assert_within(product(x_TD, by_16), x_TD, one, is_lossless=True)
    packed.configure(exact=True)
    x_TD = inputs(9, 160)
    assert torch.equal(product(x_TD, by_16), product(x_TD, one))


def test_a_product_of_interleaved_rows_is_the_same_among_any_rows() -> None:
    one, x_TD = interleaved(case((992, 576), 4, 32)), inputs(11, 576)
    alone = torch.cat([product(row.unsqueeze(0), one) for row in x_TD])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for num_rows in (2, 3, 7, 8, 9, 11):
                assert torch.equal(product(x_TD[:num_rows], one), alone[:num_rows])
    finally:
        torch.set_num_threads(before)
    x_TD[2, 50] = NAN
    found = product(x_TD, one)
    assert found[2].isnan().all() and torch.equal(found[3:9], alone[3:9])


def test_rows_are_interleaved_where_that_is_possible_and_faster() -> None:
    def prefers(one: Case) -> bool:
        return packed.prefers_interleaved(packed.Weight(*one[:6]), one.depth)

    fits = [case((32, 96), 4, 32), case((3, 16, 96), 8, 96), case((16, 64), 4, 32, "iq4_nl")]
    assert len({prefers(one) for one in fits}) == 1  # depends on the processor alone
    for other in (
        case((40, 96), 4, 32),
        case((32, 80), 4, 80),
        case((32, 96), 4, 16),
        case((32, 96), 4, 32, "no integers"),
        interleaved(fits[0]),
    ):
        assert not prefers(other)
    packed.configure(exact=True)
    assert not any(map(prefers, fits))


@pytest.mark.parametrize("bits, table", [(4, "codes"), (4, "mxfp4"), (8, "codes")])
def test_rows_of_experts_may_be_interleaved(bits: int, table: str) -> None:
    one = case((5, 48, 96), bits, 32, table)
    one.scale[-1] = NAN
    by_16 = interleaved(one)
    experts_of(
        lambda x, expert_TK: packed.packed_expert_linear(x, expert_TK, *by_16[:6]), one.value, one
    )
    value = reference.packed.unpacked(*by_16[:6], 96)
    assert torch.equal(value[:4], reference.packed.unpacked(*one[:6], 96)[:4])
