"""CPU kernels of packed weights are within the arithmetic's own bound, on every instruction set.

Inputs are quantized to int8 in blocks of 32: an element changes by at most 1/254 of the largest
magnitude m in its block, so that a sum changes by at most the sum of |w| · m / 254. `LOSSLESS`
inputs are integers up to 127 times a power of 2, which quantizing does not change: only the
rounding of fp32 is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm.compile.lower import calls
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import packed
from nanovllm.platforms import cpu as cpu_platform
from tests.kernels.instruction_sets import OPTIONS, library

_is_available, _reason = cpu_library.available()
pytestmark = pytest.mark.skipif(not _is_available, reason=f"no C++ compiler: {_reason}")

NAN = float("nan")
BLOCK = 32
MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TABLES: dict[str, tuple[float, ...] | None] = {
    "codes": None,
    "symmetric": tuple(float(i - 8) for i in range(16)),
    "mxfp4": MXFP4,
    "iq4_nl": IQ4_NL,
    "iq4_nl / 127": tuple(level / 127 for level in IQ4_NL),
    "positive": tuple(float(i) for i in range(1, 17)),
    "no integers": tuple((i / 15) ** 3 - 0.4 for i in range(16)),
}
QUANTIZED = tuple(name for name in TABLES if name != "no integers")
DTYPES = (torch.float32, torch.bfloat16)
# half of the distance of neighbours, relative to the number
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=OPTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of a build for some instructions."""
    if OPTIONS[request.param]:
        built = library(packed, request.param)
        monkeypatch.setattr(packed, "_load", lambda: built)


@pytest.fixture(autouse=True)
def _quantized_inputs() -> Iterator[None]:
    before = packed._State.exact
    packed.configure(exact=False)
    yield
    packed.configure(exact=before)


class Case(NamedTuple):
    """A weight as views of larger tensors that hold NaN, with its values in fp64."""

    code: Tensor
    scale: Tensor
    offset: Tensor | None
    table: Tensor | None
    bits: int
    group: int
    level: Tensor

    @property
    def depth(self) -> int:
        return self.level.shape[-1]

    def of_columns(self, of_groups: Tensor) -> Tensor:
        return of_groups.double().repeat_interleave(self.group, -1)[..., : self.depth]

    @property
    def value(self) -> Tensor:
        value = self.level * self.of_columns(self.scale)
        return value if self.offset is None else value + self.of_columns(self.offset)

    @property
    def parts(self) -> Tensor:
        """The magnitudes that a sum adds: those of level · scale and of offset."""
        size = (self.level * self.of_columns(self.scale)).abs()
        return size if self.offset is None else size + self.of_columns(self.offset).abs()


def case(
    shape: tuple[int, ...],
    bits: int,
    group: int,
    table: str = "codes",
    has_offset: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> Case:
    """`shape` is [.., O, D]. Bits behind the depth are random, and so are bytes behind a row."""
    *outer, depth = shape
    num_groups = -(-depth // group)
    levels = TABLES[table]
    code = torch.randint(2**bits, shape, dtype=torch.uint8)
    filler = torch.randint(2**bits, (*outer, -depth % BLOCK), dtype=torch.uint8)
    row = reference.packed.pack(code if bits == 8 else torch.cat((code, filler), -1), bits)
    wide = torch.full((*outer, row.shape[-1] + 7), 255, dtype=torch.uint8)
    wide[..., : row.shape[-1]] = row
    scales = torch.full((2, *outer, num_groups + 3), NAN)
    scales[..., 1 : num_groups + 1] = torch.randn(2, *outer, num_groups)
    scale, offset = scales.to(scale_dtype)[..., 1 : num_groups + 1]
    table_levels = None if levels is None else torch.tensor(levels)
    level = code.double() if levels is None else torch.tensor(levels).double()[code.long()]
    return Case(
        wide[..., : row.shape[-1]],
        scale,
        offset if has_offset else None,
        table_levels,
        bits,
        group,
        level,
    )


def inputs(num_rows: int, depth: int, is_lossless: bool = False) -> Tensor:
    """A view of a tensor with NaN around it."""
    wide = torch.full((num_rows + 1, depth + 9), NAN)
    x_TD = torch.randn(num_rows, depth)
    if is_lossless:
        x_TD = torch.randint(-127, 128, (num_rows, depth)).float()
        x_TD[:, ::BLOCK] = 127.0  # the largest of each block
        x_TD *= (
            2.0
            ** torch.randint(-3, 4, (num_rows, -(-depth // BLOCK))).repeat_interleave(BLOCK, 1)[
                :, :depth
            ]
        )
    wide[:num_rows, 2 : depth + 2] = x_TD
    return wide[:num_rows, 2 : depth + 2]


def change_of_inputs(x_TD: Tensor) -> Tensor:
    """The most that quantizing changes an element, with what is rounded on the way."""
    depth = x_TD.shape[-1]
    blocks = torch.nn.functional.pad(x_TD.double(), (0, -depth % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1).repeat_interleave(BLOCK, -1)[..., :depth]
    return largest / 254 * (1 + 2.0**-14)


def assert_within(
    found: Tensor, x_TD: Tensor, one: Case, rest: Tensor | None = None, is_lossless: bool = False
) -> None:
    """`rest` is what is added to the product. The sum of products in fp32 has fewer roundings than
    columns, and each is of at most the sum of magnitudes."""
    x, added = x_TD.double(), 0.0 if rest is None else rest.double()
    expected = x @ one.value.T + added
    size = x.abs() @ one.parts.T
    bound = size * (one.depth + 8) * 2.0**-24
    if not is_lossless:
        bound = bound + change_of_inputs(x) @ one.value.abs().T
    bound = bound + (expected.abs() + abs(added) + bound) * 2 * ROUNDING[found.dtype]
    assert found.dtype == x_TD.dtype and found.shape == expected.shape
    excess = (found.double() - expected).abs() - bound
    assert excess.max().item() <= 0  # a NaN fails, too


def product(
    x_TD: Tensor, one: Case, bias_O: Tensor | None = None, residual_TO: Tensor | None = None
) -> Tensor:
    return packed.packed_linear(x_TD, *one[:6], bias_O, residual_TO)


@pytest.mark.parametrize("bits, table", [*((4, name) for name in QUANTIZED), (8, "codes")])
@pytest.mark.usefixtures("instructions")
def test_integers_are_multiplied_exactly_for_every_group(bits: int, table: str) -> None:
    for depth in (19, 99, 640, 1000):
        for group in (16, 32, 48, 64, 96, 128, 512, depth):
            one = case((19, depth), bits, group, table)
            for num_rows in (1, 4, 6):
                x_TD = inputs(num_rows, depth, is_lossless=True)
                assert_within(product(x_TD, one), x_TD, one, is_lossless=True)


@pytest.mark.parametrize("bits, table", [(4, "codes"), (4, "iq4_nl"), (8, "codes")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instructions")
def test_quantized_inputs_change_a_sum_by_their_own_change_at_most(
    bits: int, table: str, dtype: torch.dtype
) -> None:
    for depth, group in ((99, 16), (576, 32), (1000, 128)):
        for scale_dtype in (torch.float32, torch.bfloat16, torch.float16):
            one = case((99, depth), bits, group, table, scale_dtype=scale_dtype)
            bias_O, num_outputs = torch.randn(99).to(dtype), 99
            for num_rows in (*range(1, 10), 70):
                x_TD = inputs(num_rows, depth).to(dtype)
                residual_TO = torch.randn(num_rows, num_outputs).to(dtype)
                assert_within(product(x_TD, one, bias_O), x_TD, one, bias_O)
                found = product(x_TD, one, None, residual_TO)
                assert_within(found, x_TD, one, residual_TO)
                expected = product(x_TD, one, bias_O) + residual_TO
                assert torch.equal(product(x_TD, one, bias_O, residual_TO), expected)


@pytest.mark.parametrize(
    "bits, table, group", [(4, "no integers", 64), (4, "codes", 20), (8, "codes", 33)]
)
@pytest.mark.usefixtures("instructions")
def test_weights_that_are_no_integers_leave_inputs_as_they_are(
    bits: int, table: str, group: int
) -> None:
    for has_offset in (False, True):
        for depth in (50, 99, 576):  # more than one group
            one = case((19, depth), bits, group, table, has_offset, torch.float16)
            for num_rows in (1, 2, 9, 70):
                x_TD = inputs(num_rows, depth)
                assert_within(product(x_TD, one), x_TD, one, is_lossless=True)


def test_exact_inputs_are_not_quantized() -> None:
    packed.configure(exact=True)
    for bits, table in ((4, "codes"), (4, "mxfp4"), (8, "codes")):
        one = case((19, 99), bits, 32, table)
        for dtype in DTYPES:
            for num_rows in (1, 5, 70):
                x_TD = inputs(num_rows, 99).to(dtype)
                assert_within(product(x_TD, one), x_TD, one, is_lossless=True)


def test_a_table_of_8_bits_is_read_by_code() -> None:
    one, levels = case((19, 99), 8, 32), torch.randn(256)
    level = levels.double()[one.code[:, :99].long()]
    one = one._replace(table=levels, level=level)
    x_TD = inputs(3, 99)
    assert_within(product(x_TD, one), x_TD, one, is_lossless=True)


@pytest.mark.parametrize("bits, table", [(4, "no integers"), (4, "codes"), (8, "codes")])
def test_many_rows_in_bf16_round_weights_to_bf16_at_most(bits: int, table: str) -> None:
    for depth in (99, 576):
        one = case((99, depth), bits, 32, table)
        x_TD, bias_O = inputs(130, depth).to(torch.bfloat16), torch.randn(99).to(torch.bfloat16)
        found, x = product(x_TD, one, bias_O), x_TD.double()
        expected = x @ one.value.T + bias_O.double()
        bound = x.abs() * 2.0**-8 @ one.value.abs().T + x.abs() @ one.parts.T * depth * 2.0**-24
        bound = bound + (expected.abs() + bound) * 2.0**-7
        assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("table", ["codes", "mxfp4", "no integers"])
def test_a_row_is_the_same_among_any_rows_and_on_any_number_of_threads(table: str) -> None:
    """Among many rows a matrix unit multiplies, which adds up blocks in another order."""
    one, x_TD = case((989, 576), 4, 32, table), inputs(70, 576)
    alone = torch.cat([product(row.unsqueeze(0), one) for row in x_TD])
    among_many = product(x_TD, one)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for num_rows in (2, 3, 7, 8, 9):
                assert torch.equal(product(x_TD[:num_rows], one), alone[:num_rows])
            for num_rows in (16, 33, 70):
                assert torch.equal(product(x_TD[-num_rows:], one), among_many[-num_rows:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.usefixtures("instructions")
def test_an_input_that_is_no_number_spoils_its_own_row_alone(bad: float) -> None:
    for bits, table, group in ((4, "codes", 32), (4, "mxfp4", 16), (8, "codes", 99)):
        one, x_TD = case((19, 99), bits, group, table), inputs(5, 99)
        clean = product(x_TD, one)
        x_TD[2, 50] = bad
        found = product(x_TD, one)
        assert found[2].isnan().all()
        assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_inputs_of_zeros_and_tiny_inputs_give_the_bias() -> None:
    one, bias_O = case((19, 99), 4, 32), torch.randn(19)
    for value in (0.0, 1e-38):
        found = product(torch.full((2, 99), value), one, bias_O)
        torch.testing.assert_close(found, bias_O.expand(2, 19), rtol=1e-6, atol=1e-30)


def test_other_layouts_and_dtypes_are_computed_as_well() -> None:
    one = case((19, 99), 4, 32)
    x_TD = inputs(5, 99)
    expected = product(x_TD, one)
    assert torch.equal(product(x_TD.T.contiguous().T, one), expected)
    assert product(x_TD[:0], one).shape == (0, 19)
    half = x_TD.half()
    meaning = reference.packed.packed_linear(half, *one[:6], None)
    assert torch.equal(product(half, one), meaning)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, table", [(4, "codes"), (4, "no integers"), (8, "codes")])
@pytest.mark.usefixtures("instructions")
def test_rows_of_a_table_are_its_real_values(bits: int, table: str, dtype: torch.dtype) -> None:
    one, row_T = (
        case((19, 99), bits, 16, table, scale_dtype=torch.float16),
        torch.tensor([18, 0, 7]),
    )
    found = packed.packed_lookup(row_T, *one[:6], 99, dtype)
    expected = one.value[row_T]
    error = (found.double() - expected).abs()
    assert (error <= 4 * ROUNDING[dtype] * one.parts[row_T]).all()
    assert packed.packed_lookup(row_T[:0], *one[:6], 99, dtype).shape == (0, 99)


def test_a_row_that_is_not_there_raises() -> None:
    one = case((19, 99), 4, 32)
    with pytest.raises(IndexError, match="rows 3 to 19 are read, and there are 19"):
        packed.packed_lookup(torch.tensor([3, 19]), *one[:6], 99, torch.float32)


def experts_of(run: Callable[[Tensor, Tensor], Tensor], values: Tensor, check: Case | None) -> None:
    """`run(x, expert_TK)` is the product of each pair, also for x of each pair."""
    num_experts, num_outputs, depth = values.shape
    for num_tokens, top_k in ((1, 2), (3, 1), (19, 3), (70, 2)):
        expert_TK = torch.randint(num_experts - 1, (num_tokens, top_k))  # the last one is NaN
        for x in (inputs(num_tokens, depth), torch.randn(num_tokens, top_k, depth)):
            found = run(x, expert_TK.int())
            assert found.shape == (num_tokens, top_k, num_outputs)
            for e in range(num_experts - 1):
                token, k = (expert_TK == e).nonzero().T
                rows = x[token] if x.dim() == 2 else x[token, k]
                if check is None:
                    change = rows.double().abs() @ values[e].abs().T * depth * 2.0**-24
                    error = (found[token, k] - rows.double() @ values[e].T).abs()
                    assert (error <= change + 1e-30).all()
                elif len(token):
                    one = check._replace(
                        scale=check.scale[e],
                        offset=None if check.offset is None else check.offset[e],
                        level=check.level[e],
                    )
                    assert_within(found[token, k], rows, one)
    with pytest.raises(IndexError, match=f"experts 0 to 9 are chosen, and there are {num_experts}"):
        run(inputs(1, depth), torch.tensor([[0, 9]], dtype=torch.int32))


@pytest.mark.parametrize(
    "bits, table", [(4, "codes"), (4, "mxfp4"), (4, "no integers"), (8, "codes")]
)
def test_pairs_of_tokens_and_experts_are_multiplied_by_the_experts_of_their_own(
    bits: int, table: str
) -> None:
    one = case((5, 19, 99), bits, 32, table)
    one.scale[-1] = NAN
    experts_of(
        lambda x, expert_TK: packed.packed_expert_linear(x, expert_TK, *one[:6]), one.value, one
    )


@pytest.mark.parametrize("rows, columns", [(128, 128), (1, 99), (2, 32), (19, 16), (3, 20)])
@pytest.mark.usefixtures("instructions")
def test_fp8_is_exact_for_every_block(rows: int, columns: int) -> None:
    values, scale = fp8_weight((5, 99, 99), rows, columns)
    real = fp8_values(values, scale, rows, columns)
    for num_rows in (1, 2, 5, 9, 70):
        x_TD, bias_O = inputs(num_rows, 99), torch.randn(99)
        expected = x_TD.double() @ real[0].T + bias_O.double()
        size = x_TD.double().abs() @ real[0].abs().T + bias_O.double().abs()
        found = packed.fp8_linear(x_TD, values[0], scale[0], rows, columns, bias_O)
        assert ((found - expected).abs() <= size * 107 * 2.0**-24).all()
        bf16 = x_TD.bfloat16()
        expected = bf16.double() @ real[0].T
        found = packed.fp8_linear(bf16, values[0], scale[0], rows, columns, None)
        # a weight in bf16 changes by 2^-9 of itself, and the result by 2^-9
        assert ((found.double() - expected).abs() <= size * 2.0**-7).all()
    scale[-1] = NAN
    experts_of(
        lambda x, expert_TK: packed.fp8_expert_linear(x, expert_TK, values, scale, rows, columns),
        real,
        None,
    )


def fp8_weight(shape: tuple[int, int, int], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Every number of fp8 but NaN, in a view of a wider tensor with NaN behind the rows."""
    bits = torch.arange(shape[0] * shape[1] * (shape[2] + 3)) % 256
    bits = bits.to(torch.uint8).view(shape[0], shape[1], -1)
    bits = torch.where((bits & 127) == 127, torch.zeros_like(bits), bits)
    bits[..., shape[2] :] = 127
    scale = torch.rand(shape[0], -(-shape[1] // rows), -(-shape[2] // columns)) + 0.5
    return bits.view(torch.float8_e4m3fn)[..., : shape[2]], scale


def fp8_values(values: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    of_rows = scale.double().repeat_interleave(rows, -2)[:, : values.shape[1]]
    of_both = of_rows.repeat_interleave(columns, -1)[..., : values.shape[2]]
    return values.float().double() * of_both


def test_a_nan_in_fp8_spoils_its_own_output_alone() -> None:
    values, scale = fp8_weight((1, 19, 99), 1, 32)
    x_TD = inputs(3, 99)
    clean = packed.fp8_linear(x_TD, values[0], scale[0], 1, 32, None)
    for code in (127, 255):
        raw = values[0].view(torch.uint8).clone()
        raw[4, 77] = code
        found = packed.fp8_linear(x_TD, raw.view(torch.float8_e4m3fn), scale[0], 1, 32, None)
        assert found[:, 4].isnan().all()
        others = [o for o in range(19) if o != 4]
        assert torch.equal(found[:, others], clean[:, others])


def test_graphs_keep_the_ops_and_need_no_compiler() -> None:
    one = case((19, 96), 4, 32)

    def function(row: Tensor, code: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        weight = code, scale, offset, None, 4, 32
        x_TD = ops.packed_lookup(row, *weight, 96, torch.float32)
        return ops.packed_linear(x_TD, *weight, None)

    row = torch.tensor([18, 0, 7])
    given = {"row": row, "code": one.code, "scale": one.scale, "offset": one.offset}
    graph, fakes, _ = trace(function, given)
    kept = replace_ops(graph, fakes, keep=cpu_platform._keeps_op)
    names = [name for node in kept.graph.nodes if (name := ops.op_name(node.target))]
    assert names == ["packed_lookup", "packed_linear"]
    assert calls.is_enough(kept)


def test_what_is_known_of_a_weight_is_of_its_own_tensors() -> None:
    """Other scales, sizes or codes are checked again; nothing is kept longer than the codes."""
    x = torch.randn(1, 64).sign()  # quantizing does not change it
    code = torch.randint(0, 256, (3, 32), dtype=torch.uint8)
    number = len(packed._known)

    def check(code: Tensor, scale: Tensor, group: int) -> None:
        ours = packed.packed_linear(x, code, scale, None, None, 4, group, None)
        expected = reference.packed.packed_linear(x, code, scale, None, None, 4, group, None)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-3)

    wide = torch.rand(3, 4)
    for _ in range(2):
        check(code, torch.rand(3, 2), 32)
        check(code, torch.rand(3, 1), 64)
        check(code, wide[:, ::2].contiguous().half(), 32)
        check(code, wide[:, :2], 32)  # rows that are farther apart
    assert len(packed._known) == number + 1
    del code
    assert len(packed._known) == number
