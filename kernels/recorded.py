"""What code of all devices tells recordings of steps: see cpu/recording.py."""

from __future__ import annotations

import threading
from typing import ClassVar


class Unrecordable(Exception):
    """A step has something that is not recorded."""


class State:
    num_moves: ClassVar[int] = 0
    thread: ClassVar[int | None] = None  # which records a step now


def moved() -> None:
    """Memory that steps use is freed or gets other addresses: they are recorded again."""
    State.num_moves += 1


def refuse(what: str) -> None:
    """Raise Unrecordable if this thread records a step, since `what` cannot be recorded."""
    if State.thread is not None and State.thread == threading.get_ident():
        raise Unrecordable(what)
