"""Prompts for training a head: those of a file, or made-up questions of chats and about code."""

from __future__ import annotations

from itertools import product
from pathlib import Path

CHAT = (
    "Explain {} to a child.", "What are three facts about {}?", "Write a short story about {}.",
    "Why do people care about {}?", "Give me advice about {}.", "Compare {} of today and the past.",
)  # fmt: skip
SUBJECTS = (
    "rain", "the moon", "trains", "bread", "whales", "chess", "volcanoes", "bicycles", "honey bees",
    "electricity", "the sea", "mountains", "music", "clocks", "gardens", "winter", "bridges",
    "libraries", "coffee", "rivers", "sleep", "money", "tea", "markets", "cats", "maps",
)  # fmt: skip
CODE = (
    "Write a Python function that {}.", "Show me JavaScript code that {}.",
    "Write a test in Python for a function that {}.", "Explain step by step how a program {}.",
)  # fmt: skip
TASKS = (
    "reverses a string", "sorts a list of numbers", "counts the words in a file",
    "finds the largest number", "checks if a number is prime", "adds two matrices",
    "removes duplicates from a list", "computes the factorial of n", "reads a CSV file",
    "merges two dictionaries", "finds the longest word", "converts Celsius to Fahrenheit",
    "validates an email address", "computes a Fibonacci number", "searches a binary tree",
)  # fmt: skip
HELD_OUT_EVERY = 10


def made() -> list[str]:
    """Prompts of both kinds, taking turns."""
    chat = [text.format(subject) for subject, text in product(SUBJECTS, CHAT)]
    code = [text.format(task) for task, text in product(TASKS, CODE)]
    both = [one for pair in zip(chat, code) for one in pair]
    return both + chat[len(code) :]


def read(path: Path | None) -> list[str]:
    """A prompt from each line of a file that is not empty. Raises ValueError for too few."""
    if path is None:
        return made()
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in found if line]
    if len(found) < HELD_OUT_EVERY:
        raise ValueError(f"{path} has {len(found)} prompts: it must have at least {HELD_OUT_EVERY}")
    return found


def split(prompts: list[str], num: int | None) -> tuple[list[str], list[str]]:
    """Up to `num` prompts for training, and the others: every tenth is held out."""
    held_out = prompts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [one for i, one in enumerate(prompts, 1) if i % HELD_OUT_EVERY]
    return training[:num], held_out
