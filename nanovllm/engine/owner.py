"""The process that an engine belongs to."""

from __future__ import annotations

import os


class Owner:
    """The process that makes this. A fork of it has the engine's memory, but none of its threads,
    and shares its sockets and processes: a call would wait for ever, or disturb the owner."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise RuntimeError in a fork."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this engine was loaded in process {self._pid}, and process {os.getpid()} is a "
                "fork of it, where no engine can run: load the model in the process that uses it "
                "(multiprocessing: with the start method 'spawn')"
            )
