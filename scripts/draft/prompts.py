"""Prompts for training a head: those of a file, or made-up ones of three kinds.

The held-out prompts of made-up ones have subjects and forms that training has not.
"""

from __future__ import annotations

import random
from itertools import product, zip_longest
from pathlib import Path

from draft.prompt_words import CHAT, CODE, PROSE, SUBJECTS, TASKS

HELD_OUT = {
    "prose": (
        "Tell the legend of a lighthouse keeper who lost his lamp.",
        "What does a harbor look like at dawn after a storm?",
        "Write a news report on a village that elected a goat as its mayor.",
        "Continue this: The old soldier opened the box, and nobody spoke.",
        "Write a diary entry of an astronaut on her last day in orbit.",
        "Write a speech for the retirement of a school teacher.",
    ),
    "code": (
        "Write an SQL query that lists customers with more than two orders.",
        "Write a bash script that renames all .txt files to .md.",
        "Make a class in Python for a bank account with deposits and withdrawals.",
        "Write an HTML page with a form for a name and a password.",
        "How do I write a stack in Rust?",
        "Fix this code: for i in range(10) print(i)",
    ),
    "chat": (
        "I feel tired after work every evening. What should I do?",
        "Plan a weekend in Lisbon for two people.",
        "Who are you, and what can you do?",
        "What is the difference between a virus and a bacterium?",
        "Say this politely: send me the report now.",
        "Which laptop should a student buy?",
    ),
}  # fmt: skip
HELD_OUT_EVERY = 10  # of the prompts of a file


def made() -> list[str]:
    """Prompts of all kinds, taking turns, in an order in which the first ones are varied, too."""
    pairs = (SUBJECTS, PROSE), (TASKS, CODE), (SUBJECTS, CHAT)
    kinds = [[text.format(one) for one, text in product(*pair)] for pair in pairs]
    for some in kinds:
        random.Random(0).shuffle(some)
    return [one for turn in zip_longest(*kinds) for one in turn if one is not None]


def read(path: Path) -> list[str]:
    """A prompt from each line of a file that is not empty. Raises ValueError for too few."""
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in found if line]
    if len(found) < HELD_OUT_EVERY:
        raise ValueError(f"{path} has {len(found)} prompts: it must have at least {HELD_OUT_EVERY}")
    return found


def training(path: Path | None, num: int | None = None) -> list[str]:
    """Up to `num` prompts for training: the made-up ones, or nine of ten of a file."""
    found = made() if path is None else read(path)
    if path is not None:
        found = [one for i, one in enumerate(found, 1) if i % HELD_OUT_EVERY]
    return found[:num]


def held_out(path: Path | None) -> dict[str, list[str]]:
    """The prompts that training has not seen, by kind; those of a file are of one kind."""
    if path is not None:
        return {"file": read(path)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]}
    return {kind: list(some) for kind, some in HELD_OUT.items()}
