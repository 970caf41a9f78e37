"""The sampler draws from the right distribution; filters and penalties equal plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import register as cpu_register
from nanovllm.runner import sampling as sampler
from nanovllm.schedule.plan import ALL_TOKENS, SAMPLING_FIELDS

INF, NAN = float("inf"), float("nan")
Sample = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def rows(value: float, num: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((num,), value, dtype=dtype)


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def chi_square_limit(freedom: int) -> float:
    """Exceeded once in 10⁶ by chance (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


def assert_drawn_from(token_N: Tensor, prob_V: Tensor) -> None:
    count_V = torch.bincount(token_N, minlength=prob_V.shape[0]).double()
    expected_V = prob_V.double() * token_N.shape[0]
    assert count_V[expected_V == 0].sum() == 0
    usual_V = expected_V >= 5
    rare = (count_V[~usual_V].sum() - expected_V[~usual_V].sum()) ** 2 / expected_V[
        ~usual_V
    ].sum().clamp(min=5)
    statistic = ((count_V - expected_V)[usual_V] ** 2 / expected_V[usual_V]).sum() + rare
    assert statistic < chi_square_limit(int(usual_V.sum())), (count_V, expected_V)


# noise --------------------------------------------------------------------------------------------


def test_hash_is_a_bijection_of_32_bits() -> None:
    x = torch.arange(0, 2**32, 65537, dtype=torch.int64)
    y = reference.sample.hash32(x)
    assert y.unique().numel() == x.numel() and int(y.min()) >= 0 and int(y.max()) < 2**32
    # the published constants in Python's integers
    for value in (0, 1, 12345, 2**31, 2**32 - 1):
        expected = value
        expected = ((expected ^ (expected >> 16)) * 0x21F0AAAD) % 2**32
        expected = ((expected ^ (expected >> 15)) * 0x735A2D97) % 2**32
        assert int(reference.sample.hash32(torch.tensor(value))) == expected ^ (expected >> 15)


def test_noise_is_finite_and_gumbel() -> None:
    noise = reference.sample.gumbel_noise(torch.arange(200), torch.arange(200) * 7, 997).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772157) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.02


@pytest.mark.parametrize("change", ["seed", "high half of seed", "position", "token"])
def test_noise_is_independent_across(change: str) -> None:
    base, num = torch.arange(5, 5 + 200), 200
    first = reference.sample.gumbel_noise(base, rows(9, num, torch.int64), 501)
    if change == "seed":
        second = reference.sample.gumbel_noise(base + 1, rows(9, num, torch.int64), 501)
    elif change == "high half of seed":
        second = reference.sample.gumbel_noise(base + 2**32, rows(9, num, torch.int64), 501)
    elif change == "position":
        second = reference.sample.gumbel_noise(base, rows(10, num, torch.int64), 501)
    else:
        first, second = first[:, 1:], first[:, :-1]
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 0.02


def test_noise_depends_on_the_row_alone() -> None:
    seed_R, pos_R = torch.tensor([3, -(2**63), 2**63 - 1, 0]), torch.tensor([1, 0, 989, 40000])
    together = reference.sample.gumbel_noise(seed_R, pos_R, 97)
    for row in range(4):
        assert torch.equal(
            together[row : row + 1],
            reference.sample.gumbel_noise(seed_R[row : row + 1], pos_R[row : row + 1], 97),
        )
    assert torch.equal(together[:, :19], reference.sample.gumbel_noise(seed_R, pos_R, 19))


# the plain sampler --------------------------------------------------------------------------------


@pytest.fixture(params=[reference.sample.sample, ops.sample], ids=["formula", "kernel"])
def sample(request: pytest.FixtureRequest) -> Sample:
    """The plain-torch meaning, and the kernel for this machine's CPU."""
    if cpu_library.available()[0]:
        cpu_register.register()
    return request.param


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("by", ["seed", "position"])
def test_samples_follow_softmax(sample: Sample, temperature: float, by: str) -> None:
    num, logits_1V = 40_000, random_logits(1, 19, seed=int(temperature * 10), spread=1.5)
    counter, fixed = torch.arange(num), rows(12345, num, torch.int64)
    seed_R, pos_R = (counter, fixed) if by == "seed" else (fixed, counter)
    token_R = sample(logits_1V.expand(num, -1), rows(temperature, num), seed_R, pos_R)
    assert_drawn_from(token_R, (logits_1V[0] / temperature).softmax(-1))


def test_successive_samples_are_independent(sample: Sample) -> None:
    """Pairs of neighbouring positions follow the product of the two distributions."""
    num, logits_1V = 20_000, random_logits(1, 5, seed=4, spread=1.0)
    seed_R = torch.arange(num)
    first, second = (
        sample(logits_1V.expand(num, -1), rows(1.0, num), seed_R, rows(pos, num, torch.int64))
        for pos in (7, 8)
    )
    prob_V = logits_1V[0].softmax(-1)
    assert_drawn_from(first * 5 + second, torch.outer(prob_V, prob_V).flatten())


def test_temperature_zero_is_argmax_beside_other_rows(sample: Sample) -> None:
    logits_RV = random_logits(99, 989)
    temperature_R = torch.where(torch.arange(99) % 2 == 0, 0.0, 1.0)
    token_R = sample(logits_RV, temperature_R, torch.arange(99), torch.arange(99))
    assert torch.equal(token_R[::2], logits_RV[::2].argmax(-1))
    assert not torch.equal(token_R[1::2], logits_RV[1::2].argmax(-1))


def test_tokens_with_no_probability_are_never_drawn(sample: Sample) -> None:
    logits_RV = random_logits(500, 19)
    logits_RV[:, 3:] = -INF
    assert (
        int(sample(logits_RV, rows(5.0, 500), torch.arange(500), rows(0, 500, torch.int64)).max())
        < 3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_fp32(sample: Sample, dtype: torch.dtype) -> None:
    logits_RV = random_logits(99, 97).to(dtype)
    args = (rows(0.7, 99), torch.arange(99), torch.arange(99))
    assert torch.equal(sample(logits_RV, *args), sample(logits_RV.float(), *args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 19, 20_000])
def test_rows_of_nan_have_no_token_and_change_no_other_row(
    sample: Sample, vocab_size: int, dtype: torch.dtype
) -> None:
    logits_RV = random_logits(9, vocab_size).to(dtype)
    args = (torch.tensor([0.0, 0.8, 1.5] * 3), torch.arange(9), torch.arange(9))
    alone_R = sample(logits_RV, *args)
    logits_RV[3:6], logits_RV[6:, : vocab_size // 2], logits_RV[6:, vocab_size // 2 :] = (
        NAN,
        NAN,
        -INF,
    )
    token_R = sample(logits_RV, *args)
    assert torch.equal(token_R[:3], alone_R[:3])
    assert token_R[3:].tolist() == [reference.sample.NO_TOKEN] * 6


def test_a_nan_never_wins(sample: Sample) -> None:
    logits_RV = random_logits(99, 989)
    forbidden_RV = logits_RV.clone()
    logits_RV[:, 1::3], forbidden_RV[:, 1::3] = NAN, -INF
    args = (torch.where(torch.arange(99) % 2 == 0, 0.0, 1.3), torch.arange(99), torch.arange(99))
    assert torch.equal(sample(logits_RV, *args), sample(forbidden_RV, *args))


# filters ------------------------------------------------------------------------------------------


def plain_filter(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that stay after min_p, then top_k, then top_p of the rest, one by one."""
    prob = np.exp(logits.astype(np.float64) - logits.max())
    prob /= prob.sum()
    order = sorted(range(len(prob)), key=lambda i: (-prob[i], i))
    kept = [i for i in order if prob[i] >= min_p * prob[order[0]]]
    if top_k:
        kept = kept[:top_k]
    if top_p < 1:
        rest, kept = kept, []
        total, sum_kept = prob[rest].sum(), 0.0
        for i in rest:
            if sum_kept / total >= top_p:
                break
            kept.append(i)
            sum_kept += prob[i]
    return set(kept) or {order[0]}


FILTERS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (10_000, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.31, 0.0),
    (0, 1e-6, 0.0),
    (0, 1.0, 0.07),
    (0, 1.0, 1.0),
    (9, 0.8, 0.02),
    (3, 0.99, 0.5),
]


@pytest.mark.parametrize("vocab_size", [1, 19, 99, 989])
def test_filters_keep_what_the_plain_algorithm_keeps(vocab_size: int) -> None:
    logits_RV = random_logits(len(FILTERS), vocab_size, seed=vocab_size)
    top_k_R, top_p_R, min_p_R = (
        torch.tensor(column, dtype=torch.float32) for column in zip(*FILTERS)
    )
    kept_RV = reference.sample.apply_top_k_top_p(
        logits_RV, torch.ones(len(FILTERS)), top_k_R, top_p_R, min_p_R
    )
    for row, (top_k, top_p, min_p) in enumerate(FILTERS):
        kept = set(torch.isfinite(kept_RV[row]).nonzero().flatten().tolist())
        assert kept == plain_filter(logits_RV[row].numpy(), top_k, top_p, min_p), FILTERS[row]
        assert torch.equal(kept_RV[row][sorted(kept)], logits_RV[row][sorted(kept)])


def test_a_filtered_choice_calls_the_ops_of_a_dry_run() -> None:
    """A GPU then compiles their kernels before the first request needs them."""
    called: list[tuple[object, list[torch.dtype]]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function.namespace == "nanovllm":
                called.append((function, [tensor.dtype for tensor in args]))
            return function(*args, **(kwargs or {}))

    one_R, some_R = rows(1.0, 2), rows(5, 2, torch.int64)
    with Watch():
        fields_RF = torch.ones(2, len(SAMPLING_FIELDS))
        sampler.sample_filtered(random_logits(2, 19), fields_RF, some_R, some_R)
    visited: list[tuple[object, list[torch.dtype]]] = []
    sampler.dry_run_filtered(
        lambda op, args, kwargs: visited.append((op, [tensor.dtype for tensor in args])),
        random_logits(2, 19),
        one_R,
    )
    assert visited == called and len(called) == 2


def test_of_equal_logits_the_smaller_ids_stay() -> None:
    logits_RV = torch.zeros(2, 19)
    filters = torch.ones(2), torch.tensor([5.0, 0.0]), torch.tensor([1.0, 0.5]), torch.zeros(2)
    kept_RV = reference.sample.apply_top_k_top_p(logits_RV, *filters)
    assert torch.isfinite(kept_RV[0]).nonzero().flatten().tolist() == list(range(5))
    assert torch.isfinite(kept_RV[1]).nonzero().flatten().tolist() == list(range(10))


def test_forbidden_tokens_do_not_come_back_through_a_filter() -> None:
    logits_RV = random_logits(1, 19)
    logits_RV[0, :16] = -INF
    filters = torch.ones(1), torch.tensor([8.0]), torch.tensor([0.999]), torch.tensor([0.0])
    kept_RV = reference.sample.apply_top_k_top_p(logits_RV, *filters)
    assert not torch.isfinite(kept_RV[0, :16]).any()


def filtered(
    logits_RV: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed_R: Tensor
) -> Tensor:
    num = logits_RV.shape[0]
    fields_RF = torch.tensor([temperature, top_p, min_p, top_k, 1.0, 0.0, 0.0]).expand(num, -1)
    return sampler.sample_filtered(logits_RV, fields_RF, seed_R, rows(3, num, torch.int64))


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (12, 0.9, 0.02)]
)
def test_filtered_samples_follow_the_renormalised_softmax(
    top_k: int, top_p: float, min_p: float
) -> None:
    num, temperature, logits_1V = 20_000, 1.3, random_logits(1, 29, seed=8, spread=1.5)
    token_R = filtered(
        logits_1V.expand(num, -1), temperature, top_k, top_p, min_p, torch.arange(num)
    )
    scaled_V = logits_1V[0] / temperature
    kept = sorted(plain_filter(scaled_V.numpy(), top_k, top_p, min_p))
    prob_V = torch.zeros(29).index_put((torch.tensor(kept),), scaled_V[kept].softmax(-1))
    assert_drawn_from(token_R, prob_V)


def test_filters_that_are_off_change_nothing() -> None:
    logits_RV, seed_R = random_logits(99, 989), torch.arange(99)
    plain_R = reference.sample.sample(logits_RV, rows(0.8, 99), seed_R, rows(3, 99, torch.int64))
    assert torch.equal(filtered(logits_RV, 0.8, 0, 1.0, 0.0, seed_R), plain_R)


def test_top_k_1_and_temperature_0_are_argmax() -> None:
    logits_RV, seed_R = random_logits(99, 989), torch.arange(99)
    assert torch.equal(filtered(logits_RV, 5.0, 1, 1.0, 0.0, seed_R), logits_RV.argmax(-1))
    assert torch.equal(filtered(logits_RV, 0.0, 0, 0.9, 0.0, seed_R), logits_RV.argmax(-1))


# penalties and log-probabilities ------------------------------------------------------------------


def penalized(
    logits_RV: Tensor,
    prompts: Sequence[list[int]],
    outputs: Sequence[list[int]],
    p: tuple[float, float, float],
) -> Tensor:
    vocab_size = logits_RV.shape[1]
    count_RV = torch.stack(
        [
            torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab_size)
            for ids in outputs
        ]
    )
    seen_RV = torch.stack(
        [
            torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab_size) > 0
            for ids in prompts
        ]
    )
    strengths = [rows(value, logits_RV.shape[0]).unsqueeze(1) for value in p]
    return sampler.penalize(logits_RV, sampler.Penalties(count_RV, seen_RV, *strengths))


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits_RV, prompts, outputs = random_logits(2, 99), [[1, 2, 2, 50], [7]], [[9, 9, 2], []]
    expected = [
        RepetitionPenaltyLogitsProcessor(1.7)(
            torch.tensor([prompt + output]), logits_RV[row : row + 1].clone()
        )
        for row, (prompt, output) in enumerate(zip(prompts, outputs))
    ]
    torch.testing.assert_close(
        penalized(logits_RV, prompts, outputs, (1.7, 0.0, 0.0)), torch.cat(expected)
    )


def test_presence_and_frequency_penalties_are_the_formula() -> None:
    """OpenAI: logit − count · frequency − (count > 0) · presence, over generated tokens."""
    logits_RV, prompts, outputs = random_logits(2, 99), [[1, 2], [3]], [[9, 9, 9, 4], [5]]
    expected_RV = logits_RV.clone()
    for row, ids in enumerate(outputs):
        for token_id in set(ids):
            expected_RV[row, token_id] -= 0.4 * ids.count(token_id) + 0.6
    torch.testing.assert_close(penalized(logits_RV, prompts, outputs, (1.0, 0.6, 0.4)), expected_RV)


def test_logprobs_are_those_of_log_softmax() -> None:
    logits_RV, token_R = random_logits(3, 99), torch.tensor([5, 0, 98])
    chosen_R, top_RL, top_token_RL, rank_R = sampler.logprobs(logits_RV, token_R, 4)
    expected_RV = torch.log_softmax(logits_RV.double(), -1)
    torch.testing.assert_close(
        chosen_R.double(), expected_RV[torch.arange(3), token_R], atol=1e-5, rtol=0
    )
    for row in range(3):
        order = expected_RV[row].argsort(descending=True)
        assert order[rank_R[row] - 1] == token_R[row]
        order = order[:4]
        assert top_token_RL[row].tolist() == order.tolist()
        torch.testing.assert_close(top_RL[row].double(), expected_RV[row][order], atol=1e-5, rtol=0)
    assert sampler.logprobs(logits_RV, token_R, 0)[1].shape == (3, 0)


@pytest.mark.parametrize("num_top", [ALL_TOKENS, 98, 99, 100])
def test_all_tokens_may_be_wanted(num_top: int) -> None:
    logits_RV, token_R = random_logits(3, 99), torch.tensor([5, 0, 98])
    _, top_RL, top_token_RL, _ = sampler.logprobs(logits_RV, token_R, num_top)
    sorted_RV, order_RV = torch.log_softmax(logits_RV, -1).sort(descending=True)
    num = 98 if num_top == 98 else 99
    torch.testing.assert_close(top_RL, sorted_RV[:, :num])
    assert torch.equal(top_token_RL, order_RV[:, :num])


def test_a_row_without_a_token_leaves_the_logprobs_of_others() -> None:
    logits_RV, token_R = random_logits(3, 19), torch.tensor([4, 0, 7])
    alone = sampler.logprobs(logits_RV, token_R, 5)
    logits_RV[1], token_R[1] = NAN, reference.sample.NO_TOKEN
    for found, expected in zip(sampler.logprobs(logits_RV, token_R, 5), alone):
        assert torch.equal(found[::2], expected[::2])


def test_tokens_of_equal_probability_have_the_same_rank() -> None:
    logits_RV = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]).expand(5, -1)
    rank_R = sampler.logprobs(logits_RV, torch.arange(5), 0)[3]
    assert rank_R.tolist() == [4, 1, 2, 2, 5]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("value", [-INF, NAN])
def test_no_filter_finds_a_token_where_there_is_none(value: float, temperature: float) -> None:
    logits_1V = torch.full((1, 99), value)
    for top_k, top_p, min_p in FILTERS:
        token_R = filtered(logits_1V, temperature, top_k, top_p, min_p, torch.zeros(1).long())
        assert int(token_R) == reference.sample.NO_TOKEN


def test_filters_leave_nan_out() -> None:
    logits_RV = random_logits(19, 99)
    forbidden_RV = logits_RV.clone()
    logits_RV[:, ::7], forbidden_RV[:, ::7] = NAN, -INF
    for top_k, top_p, min_p in FILTERS:
        given = 0.7, top_k, top_p, min_p, torch.arange(19)
        assert torch.equal(filtered(logits_RV, *given), filtered(forbidden_RV, *given))
