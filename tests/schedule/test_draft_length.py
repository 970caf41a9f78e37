"""The number of draft tokens that made-up times and shares of accepted tokens lead to."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from nanovllm.schedule.draft_length import DraftLengths, StepTimes

ROWS, LENGTHS = (1, 8, 64, 256), (0, 1, 3, 7)
Share = Callable[[int], float]  # of the position


def times(cost: Callable[[int, int], float]) -> StepTimes:
    return StepTimes(ROWS, LENGTHS, [[cost(rows, num) for num in LENGTHS] for rows in ROWS])


def bandwidth_bound(rows: int, num: int) -> float:
    """Weights take 10 ms; above about 100 tokens arithmetic takes longer."""
    return max(10.0, 0.1 * rows * (1 + num)) + 0.2 * (num > 0)


def run(
    made: DraftLengths, num_rows: int, share: Share, ms: Callable[[int, int], float], num: int
) -> tuple[float, list[int]]:
    """Tokens per millisecond and row over `num` steps, and the numbers of draft tokens."""
    rng, total, tokens, chosen = random.Random(0), 0.0, 0, []
    for _ in range(num):
        drafts = made.choose(num_rows)
        accepted = [num_accepted(rng, drafts, share) for _ in range(num_rows)]
        for one in accepted if drafts else ():
            made.note_accepted(drafts, one)
        made.note_step(num_rows, drafts, ms(num_rows, drafts), num_rows + sum(accepted))
        tokens += num_rows + sum(accepted)
        total += ms(num_rows, drafts)
        chosen.append(drafts)
    return tokens / num_rows / total, chosen


def num_accepted(rng: random.Random, num_drafts: int, share: Share) -> int:
    """How many of a row's drafts are accepted."""
    places = range(1, num_drafts + 1)
    return next((place - 1 for place in places if rng.random() >= share(place)), num_drafts)


def most_common(values: list[int]) -> int:
    return max(set(values), key=values.count)


@pytest.mark.parametrize(
    ("num_rows", "share", "expected"),
    [
        (1, 0.9, 7),  # drafts are nearly free, and most are right
        (1, 0.3, 7),
        (64, 0.9, 1),  # three would take 25.6 ms, and two tokens a row take 12.8
        (64, 0.1, 0),
        (256, 0.9, 0),  # every draft token takes as long as one of a plain step
    ],
)
def test_the_length_follows_times_and_shares(num_rows: int, share: float, expected: int) -> None:
    made = DraftLengths(times(bandwidth_bound))
    _, chosen = run(made, num_rows, lambda place: share, bandwidth_bound, 300)
    assert most_common(chosen[50:]) == expected


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_longer_drafts_follow_shorter_ones_that_were_seen(share: float) -> None:
    """Drafts cost next to nothing, so all lengths are worth their time as far as is known."""
    made = DraftLengths(times(lambda rows, num: 10.0 + 0.01 * num))
    _, chosen = run(made, 1, lambda place: share, lambda rows, num: 10.0 + 0.01 * num, 200)
    drafted = [num for num in chosen if num]
    firsts = [drafted.index(num) for num in LENGTHS[1:] if num in drafted]
    assert firsts == sorted(firsts) and firsts[0] == 0
    assert all(later - first >= 4 for first, later in pairwise(firsts))
    assert (7 in drafted) == (share > 0), "the third position was never reached"


@pytest.mark.parametrize("num", [1, 2])
def test_drafts_are_verified_before_the_first_plain_step(num: int) -> None:
    """A proposer with trials of two steps drafts in the first one."""
    made = DraftLengths(times(lambda rows, drafts: 10.0), trial_steps=num)
    assert [made.choose(1) for _ in range(num + 1)] == [1] * num + [0]


def test_a_length_ends_where_drafts_become_wrong() -> None:
    def ms(rows: int, num: int) -> float:
        return 10.0 + num

    made = DraftLengths(times(ms))
    _, chosen = run(made, 8, lambda place: 0.95 if place <= 3 else 0.05, ms, 300)
    assert most_common(chosen[50:]) == 3


def test_a_first_step_that_is_held_up_does_not_let_drafts_lose_more() -> None:
    """Two plain steps, and 0.8 % of all, but for the step that uses them up."""
    num_plain, drafted = 0, []

    def ms(rows: int, num: int) -> float:
        nonlocal num_plain
        num_plain += num == 0
        return 14.0 if num else 20.0 if num_plain == 1 else 10.0

    made = DraftLengths(times(lambda rows, num: 14.0 if num else 10.0))
    for _ in range(60):
        drafts = made.choose(1)
        if drafts:
            made.note_accepted(drafts, 0)
            drafted.append(drafts)
        made.note_step(1, drafts, ms(1, drafts), 1)
    assert 4.0 * (len(drafted) - 1) <= 10.0 * (2 + 0.008 * 60)


@pytest.mark.parametrize("num_rows", [1, 7, 64, 65, 256])
@pytest.mark.parametrize("factor", [1.05, 1.5, 4.0])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_it_is_never_slower_than_plain_steps_by_two_percent(
    num_rows: int, factor: float, share: float
) -> None:
    def ms(rows: int, num: int) -> float:
        return (5.0 + rows / 50) * (factor if num else 1.0)

    made = DraftLengths(times(ms))
    # the first steps find out what is accepted
    run(made, num_rows, lambda place: share, ms, 100)
    rate, _ = run(made, num_rows, lambda place: share, ms, 600)
    assert rate >= 0.98 / ms(num_rows, 0)


def test_drafts_come_back_when_they_are_right_again() -> None:
    def ms(rows: int, num: int) -> float:
        return 10.0 * (1.2 if num else 1.0)

    made = DraftLengths(times(ms))
    _, chosen = run(made, 1, lambda place: 0.0, ms, 1000)
    assert chosen[100:].count(0) > 850 and any(chosen[100:])
    _, chosen = run(made, 1, lambda place: 0.9, ms, 2000)
    assert most_common(chosen[1000:]) == 7


def test_measured_times_replace_those_of_warm_up() -> None:
    """With long contexts drafts take longer than at warm-up, or plain steps do."""
    made = DraftLengths(times(lambda rows, num: 10.0))
    _, chosen = run(made, 1, lambda place: 0.5, lambda rows, num: 30.0 if num else 10.0, 2000)
    assert most_common(chosen[1000:]) == 0
    made = DraftLengths(times(lambda rows, num: 10.0 + 20.0 * (num > 0)))
    _, chosen = run(made, 1, lambda place: 0.5, lambda rows, num: 12.0 if num else 10.0, 6000)
    assert most_common(chosen[4000:]) == 7


def test_one_slow_step_changes_little() -> None:
    made = DraftLengths(times(lambda rows, num: 10.0))
    for _ in range(100):
        made.note_accepted(7, 3)
    before = made.choose(1)
    assert before
    made.note_step(1, before, 10.0, 4)
    made.note_step(1, before, 5000.0, 4)
    assert made.choose(1) in (0, before) and made.choose(1) == before


@pytest.mark.parametrize("num", [1, 2])
def test_a_trial_takes_as_many_steps_as_a_proposer_needs(num: int) -> None:
    made = DraftLengths(times(lambda rows, drafts: 30.0 if drafts else 10.0), trial_steps=num)
    chosen = []
    for _ in range(1500):
        drafts = made.choose(1)
        chosen.append(drafts)
        if drafts:
            made.note_accepted(drafts, 0)
        made.note_step(1, drafts, 30.0 if drafts else 10.0, 1)
    runs = "".join(map(str, chosen[100:])).strip("0").split("0")
    assert {run for run in runs if run} == {"1" * num}
    assert chosen[100:].count(1) <= 0.01 * 1400 / 2 + num, "a trial adds twice its steps' time"


def test_forced_tokens_count_as_right_and_cost_their_time() -> None:
    made = DraftLengths(times(bandwidth_bound))
    for _ in range(400):
        made.note_accepted(7, 0)  # drafts are never right
    for num, expected in ((1, 1), (3, 3), (5, 7)):
        chosen = {made.choose(1, 0, [num]) for _ in range(3)}
        assert chosen - {0} == {expected}, "some steps are plain"
    assert made.choose(64, 63, [7] + [0] * 63) == 0, "the step of all rows would take longer"


def test_forced_tokens_of_a_row_allow_others_no_lengths_that_were_not_seen() -> None:
    made = DraftLengths(times(bandwidth_bound))
    assert made.choose(2, 1, [1, 0]) == 1, "nothing is known of longer drafts"
    assert {made.choose(2, 1, [7, 0]) for _ in range(4)} - {0} == {7}, "that many are forced"


@pytest.mark.parametrize("seed", range(8))
def test_drafts_that_pay_return_after_a_bad_beginning(seed: int) -> None:
    """The first step with drafts has none yet: what an account that is just in credit allows is
    lost in it, so drafts would never be verified again."""
    rng, num_verified, has_drafts, num_steps = random.Random(seed), 0, False, 3000
    made = DraftLengths(StepTimes((1,), (0, 1), [[4.0, 5.2]]), trial_steps=2)
    for step in range(num_steps):
        num_drafts = made.choose(1)
        num_accepted = 0
        if num_drafts and has_drafts:
            num_accepted = int(rng.random() < 0.52 and step > 60)
            made.note_accepted(1, num_accepted)
            num_verified += 1
        has_drafts = num_drafts > 0
        made.note_step(1, num_drafts, 5.2 if num_drafts else 4.0, 1 + num_accepted)
    assert num_verified > num_steps / 2
