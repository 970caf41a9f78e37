"""What adapters add to a product is the formula in fp64, and rounds as the reference."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from tests.models import lora_cases

device = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 5


class Inputs(NamedTuple):
    y_TO: Tensor
    x_TD: Tensor
    adapter_T: Tensor
    order_T: Tensor
    tile_T3: Tensor
    a_NLD: Tensor
    b_NOR: Tensor
    rows: list[int]


def inputs(
    numbers: Sequence[int], rows: Sequence[int], depth: int, rank: int, dtype: torch.dtype
) -> Inputs:
    """Random inputs for tokens with these adapters. Matrices of unused slots are huge."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    num = len(numbers)
    a_NLD = drawn(SLOTS, len(rows) * rank, depth) / depth**0.5
    b_NOR = drawn(SLOTS, sum(rows), rank)
    for slot in set(range(SLOTS)) - {number - 1 for number in numbers}:
        a_NLD[slot] = b_NOR[slot] = 1e4
    at = lora_cases.grouped(numbers, device)
    return Inputs(drawn(num, sum(rows)), drawn(num, depth), *at, a_NLD, b_NOR, list(rows))


def exact(given: Inputs) -> Tensor:
    """The formula, token by token, in fp64."""
    found, rank = given.y_TO.double(), given.b_NOR.shape[2]
    for token, number in enumerate(given.adapter_T.tolist()):
        if number:
            z_L = given.a_NLD[number - 1].double() @ given.x_TD[token].double()
            parts = zip(given.b_NOR[number - 1].double().split(given.rows), z_L.split(rank))
            found[token] += torch.cat([b_OR @ z_R for b_OR, z_R in parts])
    return found


def bound(given: Inputs) -> Tensor:
    """The largest error of each number in fp32, for any order of sums (Higham, "Accuracy and
    Stability of Numerical Algorithms", 3.1): a sum of k products is wrong by at most γ(k) of the
    sum of their sizes, where γ(k) = k·u / (1 − k·u), u = 2⁻²⁴. Here sums of `depth` products are in
    sums of `rank`, and the product's number is added.
    """
    depth, rank = given.x_TD.shape[1], given.b_NOR.shape[2]
    sizes = exact(given._replace(
        y_TO=given.y_TO.abs(), x_TD=given.x_TD.abs(), a_NLD=given.a_NLD.abs(),
        b_NOR=given.b_NOR.abs(),
    ))  # fmt: skip
    steps = (depth + rank + 2) * 2.0**-24
    return steps / (1 - steps) * sizes


def check(given: Inputs) -> None:
    from nanovllm.kernels.triton import lora

    wanted, before = exact(given), given.y_TO.clone()
    expected = reference.lora.add_lora(*given)
    found = lora.add_lora(*given)
    assert torch.equal(given.y_TO, before) and found.dtype == before.dtype
    if found.dtype is torch.float32:
        assert ((found.double() - wanted).abs() <= bound(given)).all()
    else:
        # the interpreter truncates bf16: twice the error of a rounding, of inner values and the sum
        half_unit = torch.finfo(found.dtype).eps / 2
        allowed = (4 if device == "cpu" and found.dtype is torch.bfloat16 else 2) * half_unit

        def error(one: Tensor) -> float:
            return float((one.double() - wanted).norm() / wanted.norm())

        assert error(found) < max(allowed, 1.3 * error(expected))
    without = given.adapter_T == 0
    assert torch.equal(found[without], before[without])


SEVERAL = [0, 3, 1, 1, 0, 5, 3, 2, 0, 4, 4, 1, 0, 0, 3, 2, 5, 1, 3]


@pytest.mark.parametrize("numbers", [[0], [3], SEVERAL, [2] * 33, [0, 1] * 300, [1] * 20 + [0] * 7])
def test_tiles_have_each_token_once_and_one_adapter(numbers: list[int]) -> None:
    num = len(numbers)
    order_T, tile_T3 = reference.lora.adapter_tiles(torch.tensor(numbers))
    assert sorted(order_T.tolist()) == list(range(num))
    tiles = [tile for tile in tile_T3.tolist() if tile[1]]
    assert tile_T3[: len(tiles)].tolist() == tiles
    assert len(tiles) <= reference.lora.max_tiles(num, SLOTS)
    ends = [0]
    for begin, end, number in tiles:
        assert ends[-1] == begin < end <= begin + reference.lora.tile_tokens(num)
        assert {numbers[token] for token in order_T[begin:end].tolist()} == {number}
        ends.append(end)
    assert ends[-1] == num


@pytest.mark.parametrize(
    "numbers", [[0], [3], SEVERAL, [2] * 33, [0, 1] * 300, list(range(1024, 0, -1))]
)
def test_tiles_of_one_launch_are_those_of_the_reference(
    numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanovllm.kernels.triton import adapter_tiles

    monkeypatch.setattr(adapter_tiles, "MAX_TOKENS", 1024)
    adapter_T = torch.tensor(numbers, device=device)
    pairs = zip(adapter_tiles.adapter_tiles(adapter_T), reference.lora.adapter_tiles(adapter_T))
    for found, expected in pairs:
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8, 16, 19])
def test_tokens_get_what_their_adapters_add(rank: int, dtype: torch.dtype) -> None:
    check(inputs(SEVERAL, (32, 16, 16), 99, rank, dtype))


@pytest.mark.parametrize(
    "numbers",
    [
        [0],
        [2],
        [1] * 16,
        [0] * 33,
        [1] * 40 + [0] * 9 + [4] * 50,
        SEVERAL * 5,
        [3] * 300 + [0] * 200 + [2] * 19,
    ],
)
def test_each_number_of_tokens_matches_the_formula(numbers: list[int]) -> None:
    check(inputs(numbers, (48,), 64, 8, torch.float32))


@pytest.mark.parametrize("depth", [1, 19, 989, 1288, 2048])
def test_long_and_odd_rows_are_split(depth: int) -> None:
    check(inputs([3, 0, 1], (16, 112), depth, 16, torch.bfloat16))


@pytest.mark.parametrize("rows", [7, 99, 515])
@pytest.mark.parametrize("numbers", [SEVERAL, [2]])
def test_a_head_has_any_number_of_outputs(numbers: list[int], rows: int) -> None:
    check(inputs(numbers, (rows,), 40, 4, torch.float32))


def test_an_identity_gives_b_the_rows_of_a_table() -> None:
    given = inputs(SEVERAL, (64,), 8, 8, torch.float32)
    check(given._replace(a_NLD=torch.eye(8, device=device).expand(SLOTS, -1, -1).contiguous()))


@pytest.mark.parametrize("rows", [(20, 12, 12), (16,) * 9])
def test_parts_that_no_program_fits_have_the_reference(rows: tuple[int, ...]) -> None:
    check(inputs(SEVERAL, rows, 40, 4, torch.float32))


@pytest.mark.parametrize("depth", [64, 99])
def test_the_bound_finds_inputs_of_fewer_digits_or_columns(depth: int) -> None:
    """At the depths of the tests in fp32; with far more columns it would be too wide for that."""
    given = inputs(SEVERAL, (48,), depth, 8, torch.float32)
    wanted = exact(given)
    assert ((reference.lora.add_lora(*given).double() - wanted).abs() <= bound(given)).all()
    rounded = given._replace(x_TD=given.x_TD.bfloat16().float())
    cut = given._replace(x_TD=given.x_TD.clone())
    cut.x_TD[:, -1] = 0
    for wrong in (rounded, cut):
        assert ((exact(wrong) - wanted).abs() > bound(given)).any()


def test_eight_parts_have_their_own_inner_values() -> None:
    check(inputs(SEVERAL, (16, 32, 48, 16, 64, 16, 16, 32), 64, 16, torch.float32))


def test_the_result_does_not_depend_on_the_other_tokens() -> None:
    from nanovllm.kernels.triton import lora

    given = inputs(SEVERAL, (32, 16), 640, 8, torch.bfloat16)
    whole = lora.add_lora(*given)
    for token in (1, 5, 18):
        at = slice(token, token + 1)
        rows = lora_cases.grouped(SEVERAL[at], device)._asdict()
        alone = given._replace(y_TO=given.y_TO[at], x_TD=given.x_TD[at], **rows)
        assert torch.equal(lora.add_lora(*alone), whole[at])


@pytest.mark.parametrize("numbers", [SEVERAL, [0] * 3, [2]])
def test_silu_and_up_follow(numbers: list[int]) -> None:
    from nanovllm.kernels.triton import lora

    given = inputs(numbers, (48, 48), 99, 8, torch.float32)
    torch.testing.assert_close(lora.add_lora_silu(*given), reference.lora.add_lora_silu(*given))


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("rows", [(32, 16, 16), (48, 48)])
def test_one_row_is_multiplied_with_its_neighbours(
    rows: tuple[int, ...], has_norm: bool, number: int
) -> None:
    """Not rounded between, so its error is at most that of the formula in parts."""
    from nanovllm.kernels.triton import lora_row

    depth, total = 320, sum(rows)
    given = inputs([number], rows, depth, 19, torch.float16)
    silu_mul = len(rows) == 2
    residual_TO = None if silu_mul else given.y_TO
    norm_weight_D = torch.randn(depth, device=device).half() if has_norm else None
    weight_OD = (torch.randn(total, depth, device=device) / depth**0.5).half()
    bias_O = torch.randn(total, device=device).half()
    product = (given.x_TD, norm_weight_D, weight_OD, bias_O, residual_TO, 1e-6, silu_mul)
    found = lora_row.lora_linear(*product, *given[2:])
    wide = [one.double() if isinstance(one, Tensor) and one.is_floating_point() else one
            for one in (*product, *given[2:])]  # fmt: skip
    torch.testing.assert_close(
        found.double(), reference.lora.lora_linear(*wide), rtol=4e-3, atol=4e-3
    )


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 64, 256, 1000])
@pytest.mark.parametrize("case", [((4096, 1024, 1024), 4096, 16), ((4096,), 12288, 64)])
def test_sizes_of_an_8b_model_in_bf16(
    case: tuple[tuple[int, ...], int, int], num_tokens: int
) -> None:
    """Sorted and mixed adapters, and none."""
    mixed = [(7 * i + i // 5) % (SLOTS + 1) for i in range(num_tokens)]
    for numbers in (mixed, sorted(mixed), [0] * num_tokens, [3] * num_tokens):
        check(inputs(numbers, *case, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize(
    ("rows", "depth"),
    [((4096, 1024, 1024), 4096), ((4096,), 4096), ((12288, 12288), 4096), ((4096,), 12288)],
)
def test_one_row_of_an_8b_model(rows: tuple[int, ...], depth: int, number: int) -> None:
    from nanovllm.kernels.triton import lora_row

    given = inputs([number], rows, depth, 16, torch.bfloat16)
    is_out, silu_mul = len(rows) == 1, len(rows) == 2
    norm_weight_D = None if is_out else torch.randn(depth, device=device).bfloat16()
    weight_OD = (torch.randn(sum(rows), depth, device=device) / depth**0.5).bfloat16()
    residual_TO = given.y_TO if is_out else None
    product = (given.x_TD, norm_weight_D, weight_OD, None, residual_TO, 1e-6, silu_mul)
    found = lora_row.lora_linear(*product, *given[2:]).double()
    wide = [one.double() if isinstance(one, Tensor) and one.is_floating_point() else one
            for one in (*product, *given[2:])]  # fmt: skip
    wanted = reference.lora.lora_linear(*wide)
    assert (found - wanted).norm() < 4e-3 * wanted.norm()
