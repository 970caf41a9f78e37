"""The protocol of flags, counters and halves (`triton/all_reduce.py`) in random orders of steps.

A model of one program of each rank: its steps are those of the kernels, one memory access each.
`test_triton_all_reduce.py` runs the kernels themselves, in the orders that come about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from nanovllm.kernels import peers

# launch, part of the data, and what it holds
Write = tuple[int, int, str]
Steps = Iterator[Callable[[], bool] | None]  # a condition to wait for, or None: go on


class Memory:
    """What the ranks share: flags [of, by], and slabs [of, half, part]."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.flags = [[0] * num_ranks for _ in range(num_ranks)]
        self.slabs: dict[tuple[int, int, int], Write] = {}
        self.sums: dict[tuple[int, int], list[int]] = {}  # [rank, launch]: ranks in order of adding

    def raise_flags(self, rank: int, value: int) -> Steps:
        for other in range(self.num_ranks):
            assert value > self.flags[other][rank]
            self.flags[other][rank] = value
            yield None

    def reached(self, rank: int, value: int) -> Callable[[], bool]:
        return lambda: min(self.flags[rank]) >= value

    def read(self, of: int, half: int, wanted: Write) -> None:
        """Data must be those of the same launch: neither older nor overwritten."""
        assert self.slabs.get((of, half, wanted[1])) == wanted


def one_shot(memory: Memory, rank: int, launch: int, half: int) -> Steps:
    counter = 2 * launch
    memory.slabs[rank, half, 0] = (launch, 0, "x")
    yield None
    yield from memory.raise_flags(rank, counter + 2)
    yield memory.reached(rank, counter + 2)
    for other in range(memory.num_ranks):
        memory.read(other, half, (launch, 0, "x"))
        memory.sums.setdefault((rank, launch), []).append(other)
        yield None


def two_shot(memory: Memory, rank: int, launch: int, half: int) -> Steps:
    counter = 2 * launch
    for part in range(memory.num_ranks):
        memory.slabs[rank, half, part] = (launch, part, "x")
    yield None
    yield from memory.raise_flags(rank, counter + 1)
    yield memory.reached(rank, counter + 1)
    for other in range(memory.num_ranks):
        memory.read(other, half, (launch, rank, "x"))
        memory.sums.setdefault((rank, launch), []).append(other)
        yield None
    memory.slabs[rank, half, rank] = (launch, rank, "sum")
    yield None
    yield from memory.raise_flags(rank, counter + 2)
    yield memory.reached(rank, counter + 2)
    for part in range(memory.num_ranks):
        memory.read(part, half, (launch, part, "sum"))
        yield None


FORMS = {"one-shot": one_shot, "two-shot": two_shot}


def program(memory: Memory, rank: int, forms: list[str], num_halves: int) -> Steps:
    for launch, form in enumerate(forms):
        yield from FORMS[form](memory, rank, launch, launch % num_halves)


def run(num_ranks: int, forms: list[str], seed: int, num_halves: int = 2) -> Memory:
    """Run all ranks in a random order, in which some ranks are much faster than others."""
    draw, memory = random.Random(seed), Memory(num_ranks)
    left = {rank: program(memory, rank, forms, num_halves) for rank in range(num_ranks)}
    waits: dict[int, Callable[[], bool] | None] = dict.fromkeys(left)
    speed = [draw.choice((1, 10, 300)) for _ in range(num_ranks)]
    while left:
        ready = [one for one in left if (wait := waits[one]) is None or wait()]
        assert ready, "all ranks wait"
        (rank,) = draw.choices(ready, [speed[one] for one in ready])
        try:
            waits[rank] = next(left[rank])
        except StopIteration:
            del left[rank]
    return memory


@pytest.mark.parametrize("num_ranks", peers.NUM_RANKS)
def test_no_data_are_read_too_early_or_overwritten_too_early(num_ranks: int) -> None:
    for seed in range(400 // num_ranks):
        draw = random.Random(seed)
        forms = [draw.choice(list(FORMS)) for _ in range(6)]
        memory = run(num_ranks, forms, seed)
        # in the same order on each rank, so with the same bits
        assert all(order == [*range(num_ranks)] for order in memory.sums.values())
        assert len(memory.sums) == num_ranks * len(forms)


@pytest.mark.parametrize("form", FORMS)
def test_the_check_finds_a_single_half_that_is_used_again_too_early(form: str) -> None:
    def try_all() -> None:
        for seed in range(200):
            run(4, [form] * 4, seed, num_halves=1)

    with pytest.raises(AssertionError):
        try_all()
