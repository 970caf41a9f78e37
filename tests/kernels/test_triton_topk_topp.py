"""The filters that do not sort keep the same tokens as filters that sort."""

import math

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton import topk_topp

device = "cuda" if torch.cuda.is_available() else "cpu"
FILTERS = [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (300, 1.0, 0.0), (1_000_000, 1.0, 0.0),
    (0, 0.9, 0.0), (0, 0.31, 0.0), (0, 0.999, 0.0), (0, 1e-6, 0.0), (0, 1.0, 0.07),
    (0, 1.0, 1.0), (0, 1.0, 1e-9), (9, 0.8, 0.02), (3, 0.99, 0.5),
    (20, 0.95, 0.0), (500, 0.95, 1e-4),
]  # fmt: skip


def columns(filters: list[tuple[float, float, float]], temperature: float = 1.0) -> list[Tensor]:
    with_temperature = [(temperature, *one) for one in filters]
    return [
        torch.tensor(column, dtype=torch.float32, device=device)
        for column in zip(*with_temperature, strict=True)
    ]


def check(
    logits_RV: Tensor, filters: list[tuple[float, float, float]], temperature: float = 1.0
) -> None:
    """The kept tokens are the first in order, as many as in fp64.

    With top_p the number may differ if its sums are within rounding.
    """
    kept_RV = topk_topp.apply_top_k_top_p(logits_RV, *columns(filters, temperature))
    assert kept_RV.dtype is logits_RV.dtype
    for row, (top_k, top_p, min_p) in enumerate(filters):
        stays_V = kept_RV[row].isfinite()
        assert torch.equal(kept_RV[row][stays_V], logits_RV[row][stays_V])
        scaled_V = logits_RV[row].double() / (temperature or 1.0)
        sorted_V, order_V = scaled_V.sort(descending=True, stable=True)
        num = int(stays_V.sum())
        assert stays_V[order_V[:num]].all(), "not the likeliest, or not the first of equals"
        num_left = (
            int((sorted_V >= sorted_V[0] + math.log(min_p)).sum()) if min_p else len(sorted_V)
        )
        num_left = min(num_left, top_k or num_left)
        prob_V = sorted_V[:num_left].softmax(-1)
        before_V = prob_V.cumsum(-1) - prob_V
        expected = num_left if top_p >= 1 else max(1, int((before_V < top_p).sum()))
        if num != expected:
            first, last = sorted((num, expected))
            assert top_p < 1 and last <= num_left and first > 0, filters[row]
            assert (before_V[first:last] - top_p).abs().max() < 1e-5, (filters[row], num, expected)


@pytest.mark.parametrize("spread", [0.3, 4.0, 40.0])
@pytest.mark.parametrize("vocab_size", [1, 2, 19, 989, 2049, 9890])
def test_the_kept_tokens_are_those_of_sorting(vocab_size: int, spread: float) -> None:
    check(spread * torch.randn(len(FILTERS), vocab_size, device=device), FILTERS)


@pytest.mark.parametrize("temperature", [0.0, 0.25, 2.0])
def test_probabilities_follow_the_temperature(temperature: float) -> None:
    """Powers of 2 do not round, so equal logits stay equal."""
    check(2.0 * torch.randn(len(FILTERS), 989, device=device), FILTERS, temperature)
    check((3 * torch.randn(len(FILTERS), 989, device=device)).half(), FILTERS, temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_equal_logits_the_smaller_ids_stay(dtype: torch.dtype) -> None:
    """Logits in half precision have many equal values."""
    check((3 * torch.randn(len(FILTERS), 5000, device=device)).to(dtype), FILTERS)
    check(torch.randint(-3, 3, (len(FILTERS), 5000), device=device).to(dtype), FILTERS)
    check(torch.zeros(len(FILTERS), 3000, device=device, dtype=dtype), FILTERS)


def test_logits_may_have_any_size_and_sign() -> None:
    """Differences too small or too large for probabilities, and both signs of zero."""
    logits_RV = torch.randn(len(FILTERS), 99, device=device) * torch.logspace(
        -30, 4, 99, device=device
    )
    logits_RV[:, 5], logits_RV[:, 7] = 0.0, -0.0
    check(logits_RV, FILTERS)
    check(1e-4 * logits_RV - 1e4, FILTERS)


@pytest.mark.parametrize("num_left", [1, 3, 40])
def test_forbidden_tokens_stay_out(num_left: int) -> None:
    logits_RV = torch.randn(len(FILTERS), 3000, device=device)
    logits_RV[:, num_left:] = float("-inf")
    logits_RV[:, -1] = float("nan")
    kept_RV = topk_topp.apply_top_k_top_p(logits_RV, *columns(FILTERS))
    logits_RV[:, -1] = float("-inf")
    expected_RV = reference.sample.apply_top_k_top_p(logits_RV, *columns(FILTERS))
    for row, filters in enumerate(FILTERS):
        finite = kept_RV[row, :-1].isfinite().sum(), expected_RV[row].isfinite().sum()
        assert finite[0] == finite[1], filters


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_the_search_ends_without_any_token(value: float) -> None:
    logits_RV = torch.full((len(FILTERS), 5000), value, device=device)
    kept_RV = topk_topp.apply_top_k_top_p(logits_RV, *columns(FILTERS))
    assert (kept_RV.isneginf() | kept_RV.isnan()).all()


@pytest.mark.parametrize("value", [float("inf"), 3.0e38, -3.0e38])
def test_the_search_ends_with_extreme_logits(value: float) -> None:
    logits_RV = torch.randn(len(FILTERS), 99, device=device)
    logits_RV[:, 7] = value
    kept_RV = topk_topp.apply_top_k_top_p(logits_RV, *columns(FILTERS))
    best = 7 if value > 0 else int(logits_RV[1].argmax())
    assert not kept_RV.isnan().any() and kept_RV[1, best] == logits_RV[1, best], (
        "with top_k 1 the best token stays"
    )
    assert kept_RV[1].isneginf().sum() == 98


def test_rows_may_have_the_vocabulary_of_a_real_model() -> None:
    check(2.5 * torch.randn(2, 151936, device=device), [(20, 0.95, 0.0), (0, 0.95, 0.0)])


def test_there_may_be_no_rows() -> None:
    assert topk_topp.apply_top_k_top_p(
        torch.zeros(0, 5, device=device), *(torch.zeros(0, device=device),) * 4
    ).shape == (0, 5)
