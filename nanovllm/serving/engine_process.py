"""The parent's side of the engine's process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from nanovllm.checks import to_options
from nanovllm.config import EngineConfig
from nanovllm.parallel.ranks import Ranks
from nanovllm.parallel.watch import RankFailed, without_name

PROGRAM = "nanovllm.serving.process"
NAME = "the engine's process"


class EngineProcess:
    """A child process with an engine, which clients reach through sockets that it inherits.

    It ends with `close`, with the process that has started it, and after an error of a step.
    """

    def __init__(self, config: EngineConfig, num_clients: int) -> None:
        """Start the process, without waiting for it. Raises OSError.

        `clients` are the sockets of `num_clients` clients: whoever gets one takes it over.
        """
        pairs = [socket.socketpair() for _ in range(num_clients)]
        self.clients = [ours for ours, _ in pairs]
        ports = [theirs.fileno() for _, theirs in pairs]
        setup = {"options": to_options(config), "ports": ports, "environment": {}}
        names = ("the process that has started the engine", NAME)
        try:
            self._ranks = Ranks.start(setup, 2, PROGRAM, names=names, inherited=ports)
        except BaseException:
            for client in self.clients:
                client.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()

    @property
    def pid(self) -> int:
        return self._ranks.pids[0]

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        """Call it in another thread with the reason why the process has ended before `close`: a
        ValueError for options that cannot be, else RankFailed."""
        self._ranks.call_on_failure(lambda error: callback(without_name(error)))

    def kill(self) -> None:
        """End the process at once, without `close`."""
        self._ranks.fail(InterruptedError("it is no longer wanted"))

    def close(self) -> None:
        """End the process. Nothing of it is left."""
        with suppress(RankFailed):
            self._ranks.close()
