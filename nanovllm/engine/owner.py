"""The process that an engine belongs to."""

from __future__ import annotations

import os

_num_forks = 0  # since the first process that imported this module


def _note_fork() -> None:
    global _num_forks
    _num_forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class OwnerProcess:
    """The process that creates this object. A fork has the engine's memory, but none of its
    threads, and shares its sockets and processes: a call would hang or corrupt the owner's
    messages.

    Forks are counted, since reading the process id at every step costs more.
    """

    def __init__(self) -> None:
        self._pid, self._num_forks = os.getpid(), _num_forks

    @property
    def is_here(self) -> bool:
        return self._num_forks == _num_forks

    def check(self) -> None:
        """Raise RuntimeError in a fork."""
        if self._num_forks != _num_forks:
            raise RuntimeError(
                f"this engine was loaded in process {self._pid}, and process {os.getpid()} is a "
                "fork of it, where it cannot run: load the model in the process that uses it "
                "(multiprocessing: with the start method 'spawn')"
            )
