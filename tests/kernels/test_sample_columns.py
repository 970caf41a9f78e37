"""Ranks that sample from their own columns choose the tokens that one rank chooses from all.

Padding after the last token's column is infinite: if it were read, it would win. NaN never wins.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import collectives, ops, peers, reference
from nanovllm.kernels.cpu import sample as cpu_sample
from nanovllm.kernels.triton import sample as triton_sample
from nanovllm.kernels.triton import sample_columns as triton_columns
from nanovllm.kernels.triton.common import INTERPRETED
from tests.kernels.peer_ranks import Regions
from tests.models.thread_ranks import on_ranks

NAN, INF = float("nan"), float("inf")
NO_TOKEN = reference.sample.NO_TOKEN
Given = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, temperatures, seeds, positions
Sampler = Callable[..., Tensor]

# the sampler of one rank, and that of several
SAMPLERS = {
    "formula": (reference.sample.sample, collectives.sample_columns),
    "C++": (cpu_sample.sample, cpu_sample.sample_columns),
    "triton": (triton_sample.sample, triton_columns.sample_columns),
}
forked = pytest.mark.skipif(
    not bool(INTERPRETED) or not hasattr(os, "fork"), reason="needs TRITON_INTERPRET=1 and fork"
)


@pytest.fixture(params=SAMPLERS)
def samplers(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Sampler, Sampler]:
    lock, best_of_spans = threading.Lock(), triton_columns.best_of_spans

    def one_at_a_time(*args: Any) -> tuple[Tensor, Tensor]:
        with lock:  # Triton's interpreter works in one thread at a time
            return best_of_spans(*args)

    monkeypatch.setattr(triton_columns, "best_of_spans", one_at_a_time)
    return SAMPLERS[request.param]


def given(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Given:
    """Greedy rows and drawn ones in turn, with any seeds."""
    temperature_R = torch.tensor([0.0, 0.7, 1.0, 1.6]).repeat(num_rows)[:num_rows]
    seed_R = torch.randint(-(2**63), 2**63 - 1, (num_rows,))
    return (
        (4 * torch.randn(num_rows, vocab_size)).to(dtype),
        temperature_R,
        seed_R,
        torch.randint(40960, (num_rows,)),
    )


def greedy(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> Given:
    zero_R = torch.zeros(len(rows), dtype=torch.int64)
    return torch.tensor(rows).to(dtype), zero_R.float(), zero_R, zero_R


def columns(logits_RV: Tensor, rank: int, size: int) -> Tensor:
    """A rank's columns, with infinity where it has no more tokens."""
    width = -(-logits_RV.shape[1] // size)
    padded_RV = torch.nn.functional.pad(
        logits_RV, (0, width * size - logits_RV.shape[1]), value=INF
    )
    return padded_RV[:, rank * width : (rank + 1) * width].contiguous()


def found(sampler: Sampler, inputs: Given, size: int) -> Tensor:
    """The tokens that all ranks choose."""
    logits_RV, *rest = inputs
    tokens = on_ranks(
        size, lambda group: sampler(columns(logits_RV, group.rank, size), *rest, logits_RV.shape[1])
    )
    assert all(torch.equal(one, tokens[0]) for one in tokens)
    return tokens[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 99, 9890])
def test_tokens_are_those_of_one_rank(
    samplers: tuple[Sampler, Sampler], vocab_size: int, size: int, dtype: torch.dtype
) -> None:
    """The last rank has padding, or no token at all."""
    alone, together = samplers
    inputs = given(7, vocab_size, dtype)
    assert torch.equal(found(together, inputs, size), alone(*inputs))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["formula", "C++"])
def test_many_seeds_and_positions(name: str, size: int) -> None:
    alone, together = SAMPLERS[name]
    logits_RV, _, seed_R, pos_R = given(989, 101, torch.bfloat16)
    inputs = logits_RV, torch.full((989,), 0.9), seed_R, pos_R
    assert torch.equal(found(together, inputs, size), alone(*inputs))


def test_the_smallest_of_equal_tokens_wins_on_any_rank(samplers: tuple[Sampler, Sampler]) -> None:
    ties = torch.full((5, 97), -3.0)
    ties[0, [3, 60, 96]] = 2.0
    ties[1, [60, 96]] = 2.0
    ties[2, [96]] = -2.99  # as in bf16: the same number after rounding
    ties[3, [24, 25]] = 2.0  # the last token of a rank and the first of the next
    inputs = greedy(ties.tolist(), torch.bfloat16)
    assert samplers[0](*inputs).tolist() == [3, 60, 96, 24, 0]
    for size in (2, 4):
        assert found(samplers[1], inputs, size).tolist() == [3, 60, 96, 24, 0]


def test_both_zeros_are_equal(samplers: tuple[Sampler, Sampler]) -> None:
    inputs = greedy([[-1.0, -0.0, -1.0, 0.0], [-1.0, 0.0, -1.0, -0.0]])
    assert found(samplers[1], inputs, 2).tolist() == samplers[0](*inputs).tolist() == [1, 1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_and_infinities_count_as_on_one_rank(
    samplers: tuple[Sampler, Sampler], temperature: float
) -> None:
    rows = torch.randn(7, 21)
    rows[0] = NAN  # no token at all
    rows[1] = -INF
    rows[2, :11] = NAN  # none on the first rank
    rows[3, 11:] = NAN  # none on the others
    rows[4, ::2] = NAN
    rows[5] = -INF
    rows[5, 20] = -1.0e38
    rows[6, [4, 17]] = INF
    inputs = rows, torch.full((7,), temperature), torch.arange(7), torch.arange(7) + 3
    expected_R = samplers[0](*inputs)
    assert expected_R[:2].tolist() == [NO_TOKEN] * 2 and expected_R[5:].tolist() == [20, 4]
    for size in (2, 4):
        assert torch.equal(found(samplers[1], inputs, size), expected_R)


def test_no_rows(samplers: tuple[Sampler, Sampler]) -> None:
    assert found(samplers[1], given(0, 50), 2).shape == (0,)


def test_the_order_of_numbers_is_that_of_scores_and_then_of_smaller_ids() -> None:
    scores = torch.tensor([-INF, -3e38, -1.5, -1e-40, 0.0, 1e-40, 1.5, 3e38, INF])
    tokens = torch.tensor([2**31 - 2, 99, 1, 0])
    pairs = collectives.ordered(scores.repeat_interleave(4), tokens.repeat(9))
    assert pairs[1:].gt(pairs[:-1]).all()
    lowest = collectives.ordered(scores[:1], torch.tensor([NO_TOKEN]))
    with collectives.using(One()):
        assert collectives.best_of_ranks(pairs).tolist() == tokens.repeat(9).tolist()
        assert collectives.best_of_ranks(lowest).tolist() == [NO_TOKEN]


class One:
    """A group of one rank."""

    rank, size, peers = 0, 1, None

    def all_reduce(self, x: Tensor) -> None:
        raise AssertionError

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def min_int(self, value: int) -> int:
        raise AssertionError


@forked
@pytest.mark.parametrize(
    ("num_ranks", "rows", "rows_each", "vocab_size"),
    [(2, 3, 1, 2100), (4, 1, 1, 99), (2, 19, 4, 5), (8, 2, 2, 64)],
)
def test_ranks_with_shared_memory_choose_the_same_tokens(
    num_ranks: int, rows: int, rows_each: int, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their group cannot gather: everything goes through the memory. Two calls use both halves of
    the words, and a third comes back to the first."""
    monkeypatch.setattr(triton_columns, "rows_of_program", lambda num_rows: rows_each)
    calls = [given(rows, vocab_size, torch.bfloat16) for _ in range(3)]
    calls[1][0][0] = NAN
    calls[2][0][0] = 1.5  # a tie of all ranks

    def work(rank: int) -> Tensor:
        return torch.stack([
            triton_columns.sample_columns(columns(logits, rank, num_ranks), *rest, vocab_size)
            for logits, *rest in calls
        ])  # fmt: skip

    expected = torch.cat([triton_sample.sample(*inputs) for inputs in calls])
    for tokens in Regions(num_ranks).run(work):
        assert torch.equal(tokens, expected)


def test_programs_are_few_enough_and_their_rows_fit_the_words() -> None:
    for num_rows in (1, 2, 128, 129, 256, 989, 8192):
        rows = triton_columns.rows_of_program(num_rows)
        assert rows & (rows - 1) == 0 and -(-num_rows // rows) <= peers.MAX_PROGRAMS
        assert 2 * rows <= peers.PROGRAM_WORDS


def test_a_graph_names_no_rank() -> None:
    """The op's result under fake tensors needs no group: graphs are traced without one."""
    from torch._subclasses import FakeTensorMode

    inputs: Any = given(3, 10)
    with FakeTensorMode() as mode:
        tokens = ops.sample_columns(*(mode.from_tensor(one) for one in inputs), 20)
    assert tokens.shape == (3,) and tokens.dtype == torch.int64
