"""Suggests the known name for a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest


def nearest(name: str, known: Iterable[str], help_command: str) -> str:
    """The end of a message about an unknown name: a suggestion, or the command that lists names."""
    found = closest(name, known)
    return f": see {help_command}" if found is None else f": did you mean {found}?"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that begins with this one, or that has the same words with a few wrong
    letters; None if there is none, or more than one begins so. Words are separated by hyphens.
    Names that share only some words mean different things (--data-parallel-rank and
    --data-parallel-size)."""
    known = list(known)
    costs = {one: cost for one in known if (cost := _num_mistakes(name, one)) is not None}
    if costs:
        return min(costs, key=costs.__getitem__)
    begun = [one for one in known if one.startswith(name) and len(name.strip("-")) > 2]
    return begun[0] if len(begun) == 1 else None


def _num_mistakes(name: str, known: str) -> int | None:
    """The number of wrong letters; None for too many of them, in one word or in all."""
    if name.replace("-", "") == known.replace("-", ""):
        return 0
    total = 0
    for given, meant in zip_longest(name.split("-"), known.split("-"), fillvalue=""):
        num = _distance(given, meant)
        if num > _num_allowed(meant) or num > _num_allowed(given):
            return None
        total += num
    return total if total <= 2 else None


def _num_allowed(word: str) -> int:
    """How many letters of a word may be wrong, missing, added or swapped."""
    return 0 if len(word) < 3 else 1 if len(word) < 8 else 2


def _distance(one: str, other: str) -> int:
    """The number of letters to change, add, leave out or swap with the next one (Damerau's distance
    without a second change of a swapped pair)."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and (a, one[i - 2]) == (other[j - 2], b):
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
