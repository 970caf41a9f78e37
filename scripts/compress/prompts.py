"""Prompts for calibration: a user's own, the tasks of the embedded models, or general ones."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tiny.tasks import training_examples

from nanovllm import hub

TASKS = "tasks"
GENERAL = Path(__file__).with_name("prompts.txt")
Conversation = list[dict[str, Any]]


def conversations(model: str, given: str | None, num: int) -> list[Conversation]:
    """`num` conversations up to an answer; prompts are repeated if there are fewer.

    `given` is a file with one prompt in a line, or "tasks". Without it, embedded models get the
    tasks that they were trained on, and other models the prompts of prompts.txt. Raises ValueError
    for a file without prompts.
    """
    if given == TASKS or (given is None and model in hub.EMBEDDED):
        examples = itertools.islice(training_examples("calibration"), num)
        return [task.messages for task in examples]
    path = GENERAL if given is None else Path(given)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} has no prompt: it must have one in each line")
    chosen = itertools.islice(itertools.cycle(prompts), num)
    return [[{"role": "user", "content": prompt}] for prompt in chosen]
