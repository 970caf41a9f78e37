"""Experts that are on other ranks: left out of the sum, and nothing of them is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cpu import experts as cpu_experts
from nanovllm.kernels.triton import experts as triton_experts
from nanovllm.kernels.triton import grouped_gemm, moe_gemv, moe_sort

GPU = "cuda" if torch.cuda.is_available() else "cpu"
Run = Callable[..., Tensor]
# the op by each of its kernels, and the device that it runs on
KERNELS: dict[str, tuple[Run, str]] = {
    "reference": (reference.experts.experts, "cpu"),
    "cpu": (cpu_experts.experts, "cpu"),
    "few": (moe_gemv.moe_gemv, GPU),
    "many": (grouped_gemm.grouped_experts, GPU),
}
# tokens, experts per token, experts on all ranks, hidden, width
SIZES = [
    (1, 2, 8, 264, 24),
    (1, 4, 4, 19, 300),
    (3, 8, 60, 99, 12),
    (16, 8, 16, 64, 48),
    (33, 6, 12, 72, 17),
]
UNIT = torch.finfo(torch.float32).eps


class Layer(NamedTuple):
    """A layer as one rank has it: the matrices of its own experts, and their places."""

    x_TD: Tensor
    weight_TK: Tensor
    expert_TK: Tensor
    gate_up_EGD: Tensor
    down_EDF: Tensor
    local_X: Tensor

    def run(self, run: Run, residual_TD: Tensor | None = None) -> Tensor:
        return run(*self[:5], residual_TD, self.local_X)


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def whole(sizes: tuple[int, ...], device: str) -> tuple[Tensor, ...]:
    num_tokens, top_k, num_experts, hidden, size = sizes
    logits_TE = torch.randn(num_tokens, num_experts, device=device)
    weight_TK, expert_TK = reference.experts.topk_softmax(logits_TE, top_k, True)
    gate_up = torch.randn(num_experts, 2 * size, hidden, device=device) / hidden**0.5
    down = torch.randn(num_experts, hidden, size, device=device) / size**0.5
    return torch.randn(num_tokens, hidden, device=device), weight_TK, expert_TK, gate_up, down


def part(every: tuple[Tensor, ...], own: list[int]) -> Layer:
    """What a rank with these experts has. Those of them that no token chooses are NaN."""
    x_TD, weight_TK, expert_TK, gate_up, down = every
    local_X = torch.full((len(gate_up),), -1, dtype=torch.int32, device=x_TD.device)
    local_X[own] = torch.arange(len(own), dtype=torch.int32, device=x_TD.device)
    gate_up, down = gate_up[own].clone(), down[own].clone()
    unread = [i for i, expert in enumerate(own) if not (expert_TK == expert).any()]
    gate_up[unread], down[unread] = torch.nan, torch.nan
    return Layer(x_TD, weight_TK, expert_TK, gate_up, down, local_X)


def exact(layer: Layer) -> Tensor:
    """The sum over the experts that are here, by the formula in fp64."""
    rows = torch.zeros_like(layer.x_TD, dtype=torch.float64)
    for t, places in enumerate(layer.local_X[layer.expert_TK.long()].tolist()):
        x_D = layer.x_TD[t].double()
        for k, place in enumerate(places):
            if place >= 0:
                inner = reference.norm_act.silu_mul(layer.gate_up_EGD[place].double() @ x_D)
                rows[t] += layer.weight_TK[t, k].double() * (layer.down_EDF[place].double() @ inner)
    return rows


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.isfinite().all()
    assert (found.double() - expected).norm() <= 8 * UNIT * max(1.0, float(expected.norm()))


def fitting(kernel: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (min(sizes[0], 3), *sizes[1:]) if kernel == "few" else sizes


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_rank_adds_its_own_experts(kernel: str, sizes: tuple[int, ...]) -> None:
    """Every second case has a residual: each kernel and all sizes with and without."""
    residual = (SIZES.index(sizes) + list(KERNELS).index(kernel)) % 2 == 1
    run, device = KERNELS[kernel]
    every = whole(fitting(kernel, sizes), device)
    num_experts, sum_TD = sizes[2], torch.zeros_like(every[0])
    for first in range(0, num_experts, num_experts // 4):
        layer = part(every, list(range(first, first + num_experts // 4)))
        residual_TD = torch.randn_like(layer.x_TD) if residual and not first else None
        found = layer.run(run, residual_TD)
        added_TD = 0 if residual_TD is None else residual_TD
        assert_close(found, exact(layer) + added_TD)
        sum_TD += found - added_TD
    assert_close(sum_TD, reference.experts.experts(*every).double())


def test_rows_with_too_many_chunks_for_a_loop_without_branches() -> None:
    """A row of down has ten chunks. One expert is here, one elsewhere."""
    size = moe_gemv.COLUMNS * moe_gemv.UNROLLED.value + 257
    layer = part(whole((1, 2, 2, 8, size), GPU), [1])
    assert_close(layer.run(moe_gemv.moe_gemv), exact(layer))


@pytest.mark.parametrize("kernel", KERNELS)
def test_places_may_be_in_any_order(kernel: str) -> None:
    run, device = KERNELS[kernel]
    layer = part(whole((3, 4, 9, 40, 24), device), [7, 0, 4, 8])
    assert_close(layer.run(run), exact(layer))


@pytest.mark.parametrize("num_tokens", [1, 2, 19])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_whose_experts_are_all_elsewhere_gets_its_residual_alone(
    kernel: str, num_tokens: int
) -> None:
    """All matrices are NaN, and so are the weights of the experts that are elsewhere."""
    run, device = KERNELS[kernel]
    x_TD, weight_TK, expert_TK, *_ = whole((num_tokens, 2, 8, 64, 48), device)
    expert_TK[:], weight_TK[:] = torch.tensor([1, 6], dtype=torch.int32), torch.nan
    nan = torch.full((4, 96, 64), torch.nan, device=device)
    local_X = torch.tensor([0, -1, 1, 2, 3, -1, -1, -1], dtype=torch.int32, device=device)
    layer = Layer(x_TD, weight_TK, expert_TK, nan, nan[:, :64, :48].contiguous(), local_X)
    assert torch.equal(layer.run(run), torch.zeros_like(x_TD))
    residual_TD = torch.randn_like(x_TD)
    assert torch.equal(layer.run(run, residual_TD), residual_TD)


def test_programs_of_pairs_whose_expert_is_elsewhere_end_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They write no inner values, which is seen before the product with down."""
    inner: list[Tensor] = []

    class Down:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **constants: inner.append(args[0])

    monkeypatch.setattr(moe_gemv, "moe_gemv_down_kernel", Down())
    layer = part(whole((3, 4, 9, 40, 24), GPU), [2, 3, 7])
    layer.run(moe_gemv.moe_gemv)
    is_here_P = layer.local_X[layer.expert_TK.flatten().long()] >= 0
    assert 0 < is_here_P.sum() < len(is_here_P)
    assert torch.equal(inner[0].isfinite().all(1), is_here_P)
    assert inner[0][~is_here_P].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_in_a_token_or_in_a_weight_that_counts_stays_in_its_row(kernel: str) -> None:
    run, device = KERNELS[kernel]
    x_TD, weight_TK, expert_TK, *matrices = whole((3, 2, 8, 64, 48), device)
    expert_TK[:] = torch.tensor([[1, 6], [6, 2], [7, 3]], dtype=torch.int32)
    expected = part((x_TD, weight_TK, expert_TK, *matrices), [0, 1, 2, 3]).run(run)
    x_TD[0, 5], weight_TK[1, 1], weight_TK[2, 0] = torch.nan, torch.nan, torch.nan
    found = part((x_TD, weight_TK, expert_TK, *matrices), [0, 1, 2, 3]).run(run)
    assert found[:2].isnan().all()
    assert torch.equal(found[2], expected[2])  # its NaN is the weight of an expert elsewhere


@pytest.mark.parametrize("num_tokens", [1, 70, 2500])
def test_only_pairs_with_experts_that_are_here_are_sorted(num_tokens: int) -> None:
    expert_TK = torch.randint(6, (num_tokens, 2), dtype=torch.int32, device=GPU)
    local_X = torch.tensor([-1, 2, 0, -1, -1, 1], dtype=torch.int32, device=GPU)
    groups = moe_sort.sort_pairs(expert_TK, 3, local_X)
    place_P = local_X[expert_TK.flatten().long()]
    expected = [(place_P == place).nonzero().flatten().tolist() for place in range(3)]
    ends = torch.tensor([0, *map(len, expected)]).cumsum(0).tolist()
    assert groups.start_E1.tolist() == ends
    assert groups.pair_P.tolist()[: ends[-1]] == [pair for one in expected for pair in one]
    assert groups.pairs_each == 2 * num_tokens / 6


@pytest.mark.parametrize(("num_tokens", "is_few"), [(4, True), (5, False)])
def test_the_kernels_are_chosen_as_if_all_experts_were_here(
    num_tokens: int, is_few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = part(whole((num_tokens, 2, 32, 16, 8), GPU), list(range(8)))
    other = (grouped_gemm, "grouped_experts") if is_few else (moe_gemv, "moe_gemv")
    monkeypatch.setattr(*other, None)
    assert_close(layer.run(triton_experts.experts), exact(layer))


def test_an_expert_that_no_rank_has_is_refused() -> None:
    layer = part(whole((3, 2, 4, 16, 8), "cpu"), [0, 1])
    layer.expert_TK[1, 1] = 4
    with pytest.raises(IndexError):
        layer.run(cpu_experts.experts)


def test_layouts_that_no_kernel_takes_go_to_the_reference_with_their_places() -> None:
    layer = part(whole((3, 2, 4, 16, 8), GPU), [1, 2])
    strided: Any = layer.down_EDF.transpose(1, 2).contiguous().transpose(1, 2)
    layer = layer._replace(down_EDF=strided)
    runs = [triton_experts.experts] + ([cpu_experts.experts] if GPU == "cpu" else [])
    for run in runs:
        assert_close(layer.run(run), exact(layer))
