"""The CPU kernels of GGUF blocks are within the arithmetic's own bound, on every instruction set.

`test_cpu_packed` has the bound of quantized inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cpu import ggml, packed
from nanovllm.kernels.cpu import library as cpu_library
from tests.kernels.instruction_sets import OPTIONS, library
from tests.kernels.test_cpu_packed import change_of_inputs, inputs

_is_available, _reason = cpu_library.available()
pytestmark = pytest.mark.skipif(not _is_available, reason=f"no C++ compiler: {_reason}")
TYPES = reference.ggml.TYPES


@pytest.fixture(params=OPTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of a build for some instructions."""
    if OPTIONS[request.param]:
        built = library(ggml, request.param)
        monkeypatch.setattr(ggml, "_load", lambda: built)


@pytest.fixture(autouse=True)
def _quantized_inputs() -> Iterator[None]:
    before = packed.are_exact()
    packed.configure(exact=False)
    yield
    packed.configure(exact=before)


def blocks(outer: tuple[int, ...], ggml_type: int, depth: int) -> Tensor:
    """Random codes and scales, in a view of wider rows of bytes 255, whose numbers are NaN."""
    kind = TYPES[ggml_type]
    num = depth // kind.columns
    code = torch.randint(256, (*outer, num * kind.num_bytes), dtype=torch.uint8)
    half = (torch.randn(*outer, num, len(kind.halves)) / 10).half()
    wide = torch.full((*outer, code.shape[-1] + kind.num_bytes), 255, dtype=torch.uint8)
    wide[..., : code.shape[-1]] = reference.ggml.with_halves(code, ggml_type, half)
    return wide[..., : code.shape[-1]]


def assert_within(found: Tensor, x: Tensor, block: Tensor, ggml_type: int, change: Tensor) -> None:
    """The numbers of a block are a product and, in some types, less a minimum, which is no more
    than 64 times a scale that the block has: rounding is relative to both."""
    value = reference.ggml.unpacked(block, ggml_type).double()
    half = reference.ggml.halves_of(block, ggml_type).double().abs().amax(-1)
    largest = half.repeat_interleave(TYPES[ggml_type].columns, -1) * 63 * 128
    expected, depth = x.double() @ value.T, value.shape[-1]
    bound = change.double() @ value.abs().T + x.double().abs() @ largest.T * depth * 2.0**-24
    rounding = 2.0**-8 if found.dtype is torch.bfloat16 else 2.0**-23
    assert ((found.double() - expected).abs() <= bound + (expected.abs() + bound) * rounding).all()


@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.usefixtures("instructions")
def test_integers_are_multiplied_exactly(ggml_type: int) -> None:
    depths = (256, 512, 1792) if TYPES[ggml_type].columns == 256 else (32, 96, 640, 992)
    for depth in depths:
        block = blocks((19,), ggml_type, depth)
        for num_rows in (1, 2, 3, 6, 70):
            x_TD = inputs(num_rows, depth, is_lossless=True)
            found = ggml.ggml_linear(x_TD, block, ggml_type, None)
            assert_within(found, x_TD, block, ggml_type, torch.zeros(()).expand_as(x_TD))


@pytest.mark.parametrize("ggml_type", TYPES)
def test_quantized_inputs_change_a_sum_by_their_own_change_at_most(ggml_type: int) -> None:
    block = blocks((99,), ggml_type, 768)
    for dtype in (torch.float32, torch.bfloat16):
        for num_rows in (*range(1, 10), 70):
            x_TD, bias_O = inputs(num_rows, 768).to(dtype), torch.randn(99).to(dtype)
            found = ggml.ggml_linear(x_TD, block, ggml_type, None)
            assert_within(found, x_TD, block, ggml_type, change_of_inputs(x_TD))
            residual_TO = torch.randn(num_rows, 99).to(dtype)
            with_bias = ggml.ggml_linear(x_TD, block, ggml_type, bias_O)
            both = ggml.ggml_linear(x_TD, block, ggml_type, bias_O, residual_TO)
            assert torch.equal(both, with_bias + residual_TO)
            if dtype is torch.float32:
                assert torch.equal(with_bias, found + bias_O)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_a_row_is_the_same_among_any_rows_and_on_any_number_of_threads(ggml_type: int) -> None:
    """Among many rows a matrix unit multiplies, which adds up blocks in another order."""
    block, x_TD = blocks((989,), ggml_type, 256), inputs(40, 256)
    few_TD = x_TD[:9]
    alone = torch.cat(
        [ggml.ggml_linear(row.unsqueeze(0), block, ggml_type, None) for row in few_TD]
    )
    among_many = ggml.ggml_linear(x_TD, block, ggml_type, None)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ggml.ggml_linear(few_TD, block, ggml_type, None), alone)
            found = ggml.ggml_linear(x_TD[-17:], block, ggml_type, None)
            assert torch.equal(found, among_many[-17:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_pairs_are_multiplied_by_the_experts_of_their_own(ggml_type: int) -> None:
    block = blocks((4, 19), ggml_type, 256)
    expert_TK = torch.randint(4, (9, 2), dtype=torch.int32)
    for x in (inputs(9, 256), torch.randn(9, 2, 256)):
        found = ggml.ggml_expert_linear(x, expert_TK, block, ggml_type)
        for t in range(9):
            for k in range(2):
                row = (x[t] if x.dim() == 2 else x[t, k]).unsqueeze(0)
                alone = ggml.ggml_linear(row, block[expert_TK[t, k]], ggml_type, None)
                assert torch.equal(found[t, k], alone[0])
    with pytest.raises(IndexError, match="experts 0 to 9 are chosen, and there are 4"):
        ids = torch.tensor([[0, 9]], dtype=torch.int32)
        ggml.ggml_expert_linear(inputs(1, 256), ids, block, ggml_type)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_exact_inputs_are_those_of_the_meaning(ggml_type: int) -> None:
    block, x_TD = blocks((19,), ggml_type, 256), inputs(3, 256)
    packed.configure(exact=True)
    found = ggml.ggml_linear(x_TD, block, ggml_type, None)
    assert torch.equal(found, reference.ggml.ggml_linear(x_TD, block, ggml_type, None))


@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.usefixtures("instructions")
def test_rows_of_a_table_are_those_of_the_meaning(ggml_type: int) -> None:
    block = blocks((19,), ggml_type, 512)
    for dtype in (torch.float32, torch.bfloat16):
        for row_T in (torch.tensor([18, 0, 7, 7]), torch.arange(19).repeat(20)):
            found = ggml.ggml_lookup(row_T, block, ggml_type, dtype)
            assert torch.equal(found, reference.ggml.ggml_lookup(row_T, block, ggml_type, dtype))
    none_T = torch.empty(0, dtype=torch.long)
    assert ggml.ggml_lookup(none_T, block, ggml_type, torch.float32).shape == (0, 512)
    with pytest.raises(IndexError, match=r"rows 0 to 19 are read, and there are 19"):
        ggml.ggml_lookup(torch.tensor([0, 19]), block, ggml_type, torch.float32)
