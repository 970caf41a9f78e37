"""Routing and experts in Triton match the formulas in fp64, for few and for many tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton import experts as triton_experts
from nanovllm.kernels.triton import grouped_gemm, moe_gemv, moe_sort, topk_softmax

device = "cuda" if torch.cuda.is_available() else "cpu"
# (tokens, experts per token, experts, hidden, width)
SIZES = [
    (1, 2, 8, 264, 24),
    (1, 1, 3, 19, 5),
    (3, 8, 60, 99, 12),
    (5, 2, 4, 24, 40),
    (16, 8, 16, 64, 48),
    (33, 6, 7, 72, 17),
]


def inputs(
    sizes: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, top_k, num_experts, hidden, size = sizes
    logits_TE = torch.randn(num_tokens, num_experts, device=device)
    weight_TK, expert_TK = reference.experts.topk_softmax(logits_TE, top_k, True)
    gate_up = torch.randn(num_experts, 2 * size, hidden, device=device) / hidden**0.5
    down = torch.randn(num_experts, hidden, size, device=device) / size**0.5
    unused = [e for e in range(num_experts) if not (expert_TK == e).any()]
    gate_up[unused], down[unused] = torch.nan, torch.nan  # must not be read
    x_TD = torch.randn(num_tokens, hidden, device=device)
    return x_TD.to(dtype), weight_TK, expert_TK, gate_up.to(dtype), down.to(dtype)


def exact(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    rows = []
    for x_D, weight_K, expert_K in zip(x_TD.double(), weight_TK.double(), expert_TK.tolist()):
        inner = [reference.norm_act.silu_mul(gate_up[e].double() @ x_D) for e in expert_K]
        rows.append(sum(w * (down[e].double() @ h) for w, e, h in zip(weight_K, expert_K, inner)))
    return torch.stack(rows)


def error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm())


# Six roundings: gate, up, silu, its product with up, the sum, the residual. Each is off by at most
# half a unit in the last place. The interpreter truncates bf16, which is as much on average.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LIMITS = {dtype: 6 * torch.finfo(dtype).eps / 2 for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kernels", ["few", "many"])
def test_experts(kernels: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every second case has a residual: each kernel, each dtype and all sizes with and without."""
    residual = (SIZES.index(sizes) + DTYPES.index(dtype) + (kernels == "few")) % 2 == 1
    run: Callable[..., Tensor] = grouped_gemm.grouped_experts
    if kernels == "few":
        run, sizes = moe_gemv.moe_gemv, (min(sizes[0], 3), *sizes[1:])
    args = inputs(sizes, dtype)
    residual_TD = torch.randn_like(args[0]) if residual else None
    wanted = exact(*args)
    wanted = wanted if residual_TD is None else wanted + residual_TD.double()
    actual = run(*args, residual_TD)
    assert actual.dtype == dtype
    assert error(actual, wanted) < LIMITS[dtype]


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_all_tokens_choose_one_expert(num_tokens: int) -> None:
    x_TD, weight_TK, expert_TK, gate_up, down = inputs((num_tokens, 1, 5, 64, 48), torch.float32)
    expert_TK.fill_(3)
    gate_up.fill_(torch.nan)
    down.fill_(torch.nan)
    gate_up[3], down[3] = torch.randn(96, 64) / 8, torch.randn(64, 48) / 7
    wanted = exact(x_TD, weight_TK, expert_TK, gate_up, down)
    actual = triton_experts.experts(x_TD, weight_TK, expert_TK, gate_up, down)
    assert error(actual, wanted) < LIMITS[torch.float32]


@pytest.mark.parametrize(("num_tokens", "is_few"), [(1, True), (4, True), (5, False)])
def test_few_tokens_are_not_sorted(
    num_tokens: int, is_few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = inputs((num_tokens, 2, 32, 16, 8), torch.float32)
    wanted = reference.experts.experts(*args)
    other = (grouped_gemm, "grouped_experts") if is_few else (moe_gemv, "moe_gemv")
    monkeypatch.setattr(*other, None)
    torch.testing.assert_close(triton_experts.experts(*args), wanted)


def test_layouts_that_no_kernel_takes_go_to_the_reference() -> None:
    x_TD, weight_TK, expert_TK, gate_up, down = inputs((3, 2, 4, 16, 8), torch.float32)
    strided = down.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = reference.experts.experts(x_TD, weight_TK, expert_TK, gate_up, down)
    actual = triton_experts.experts(x_TD, weight_TK, expert_TK, gate_up, strided)
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("by_pair", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_expert_linear(num_tokens: int, by_pair: bool) -> None:
    x_TD, _, expert_TK, gate_up, _ = inputs((num_tokens, 3, 8, 40, 24), torch.float32)
    x = torch.randn(num_tokens, 3, 40, device=device) if by_pair else x_TD
    wanted = reference.experts.expert_linear(x, expert_TK, gate_up)
    torch.testing.assert_close(triton_experts.expert_linear(x, expert_TK, gate_up), wanted)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 1), (1, 128), (70, 5), (2500, 3)])
def test_sorted_pairs(num_tokens: int, num_experts: int) -> None:
    expert_TK = torch.randint(num_experts, (num_tokens, 2), dtype=torch.int32, device=device)
    groups = moe_sort.sort_pairs(expert_TK, num_experts)
    order = expert_TK.flatten().sort(stable=True)
    assert groups.pair_P.tolist() == order.indices.tolist()
    counts = torch.bincount(order.values, minlength=num_experts)
    assert groups.start_E1.tolist() == [0, *counts.cumsum(0).tolist()]


@pytest.mark.parametrize("is_local", [False, True])
def test_tokens_of_sorted_pairs(is_local: bool) -> None:
    """Behind the pairs of experts that are here nothing is written."""
    expert_TK = torch.randint(6, (37, 2), dtype=torch.int32, device=device)
    local_X = torch.tensor([-1, 0, 1, -1, 2, -1], dtype=torch.int32, device=device)
    groups = moe_sort.sort_pairs(expert_TK, 3 if is_local else 6, local_X if is_local else None)
    x_TD = torch.randn(37, 75, device=device)[:, 2:-1]
    pairs = groups.pair_P[: groups.start_E1[-1]].long()
    assert torch.equal(moe_sort.gather(x_TD, groups, 2)[: len(pairs)], x_TD[pairs // 2])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (60, 4), (128, 8), (7, 7)])
@pytest.mark.parametrize("num_tokens", [1, 3, 33])
def test_topk_softmax(
    num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, normalize: bool
) -> None:
    logits_TE = torch.randn(num_tokens, num_experts, device=device).to(dtype)
    weight_TK, expert_TK = topk_softmax.topk_softmax(logits_TE, top_k, normalize)
    wanted_TK, wanted_expert_TK = reference.experts.topk_softmax(logits_TE, top_k, normalize)
    assert torch.equal(expert_TK, wanted_expert_TK)
    torch.testing.assert_close(weight_TK, wanted_TK)


def test_the_smaller_of_two_equal_experts_comes_first() -> None:
    logits_TE = torch.tensor([[1.0, 2.0, 0.5, 2.0, 1.0, 1.0]] * 3, device=device)
    assert topk_softmax.topk_softmax(logits_TE, 4, True)[1].tolist() == [[1, 3, 0, 4]] * 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_gets_nan_and_valid_experts_and_harms_no_other(bad: float) -> None:
    logits_TE = torch.randn(3, 10, device=device)
    logits_TE[1, 4] = bad
    weight_TK, expert_TK = topk_softmax.topk_softmax(logits_TE, 3, False)
    wanted_TK, wanted_expert_TK = reference.experts.topk_softmax(logits_TE, 3, False)
    assert weight_TK[1].isnan().all()
    assert expert_TK[1].tolist() == wanted_expert_TK[1].tolist() == [0, 1, 2]
    torch.testing.assert_close(weight_TK, wanted_TK, equal_nan=True)
    assert torch.equal(expert_TK, wanted_expert_TK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_experts", "hidden", "top_k"), [(128, 264, 8), (1, 40, 1), (60, 19, 4), (7, 512, 7)]
)
def test_norm_router_topk(num_experts: int, hidden: int, top_k: int, dtype: torch.dtype) -> None:
    x_TD = (3 * torch.randn(1, hidden, device=device)).to(dtype)
    norm_D = (torch.rand(hidden, device=device) + 0.5).to(dtype)
    router = (torch.randn(num_experts, hidden, device=device) / hidden**0.5).to(dtype)
    bias = torch.randn(num_experts, device=device).to(dtype) if num_experts == 60 else None
    for _ in range(2):  # the second finds the counter that the first has left
        normed_TD, weight_TK, expert_TK = topk_softmax.norm_router_topk(
            x_TD, norm_D, router, 1e-6, top_k, True, bias
        )
    wanted = reference.experts.norm_router_topk(x_TD, norm_D, router, 1e-6, top_k, True, bias)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(normed_TD, wanted[0], rtol=2 * unit, atol=2 * unit)
    # logits that round differently may change places, but not by more than their rounding
    logits_TE = wanted[0].double() @ router.double().t() + (0 if bias is None else bias.double())
    chosen = logits_TE.gather(1, expert_TK.long())
    assert (chosen - logits_TE.sort(descending=True).values[:, :top_k]).abs().max() < 8 * unit
    assert len(set(expert_TK.flatten().tolist())) == top_k
    exact = chosen.softmax(-1)
    torch.testing.assert_close(weight_TK.double(), exact, rtol=16 * unit, atol=1e-6)
