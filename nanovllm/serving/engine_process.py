"""The parent's side of the engine process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from itertools import chain

from nanovllm.checks import to_options
from nanovllm.config import EngineConfig
from nanovllm.parallel.errors import RankFailed, without_name
from nanovllm.parallel.ranks import WorkerGroup

PROGRAM = "nanovllm.replicas.engine_program"
NAME = "the engine process"


class EngineProcess:
    """A child process with an engine. Clients reach it through sockets that it inherits.

    It ends on `close`, when its parent ends, and after an error in a step.
    """

    def __init__(self, config: EngineConfig, num_clients: int) -> None:
        """Start the process without waiting for it. Raises OSError.

        `clients` has the sockets of each of `num_clients` clients, which takes them over: one to
        each engine. There are several engines for replicas on this machine, which are children of
        the process. Then a last socket leads to the process itself (`replicas/handover.py`).
        """
        is_direct = config.distributed_executor_backend != "ray"
        self.num_engines = config.data_parallel_size if is_direct else 1
        num = self.num_engines + (self.num_engines > 1)
        pairs = [[socket.socketpair() for _ in range(num)] for _ in range(num_clients)]
        self.clients = [[ours for ours, _ in of_client] for of_client in pairs]
        descriptors = [[of[i][1].fileno() for of in pairs] for i in range(num)]
        setup = {
            "options": to_options(config), "clients": descriptors[: self.num_engines],
            "parents": list(chain(*descriptors[self.num_engines :])), "environment": {},
            "waits_for": None,
        }  # fmt: skip
        names = ("the engine's parent process", NAME)
        try:
            self._ranks = WorkerGroup.start(
                setup, 2, PROGRAM, names=names, inherited=list(chain(*descriptors))
            )
        except BaseException:
            for sock in chain(*self.clients):
                sock.close()
            raise
        finally:
            for _, sock in chain(*pairs):
                sock.close()

    @property
    def pid(self) -> int:
        return self._ranks.pids[0]

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        """Call it in another thread if the process ends before `close`, with the reason: ValueError
        for invalid options, else RankFailed."""
        self._ranks.call_on_failure(lambda error: callback(without_name(error)))

    def kill(self) -> None:
        """Kill the process at once."""
        self._ranks.fail(InterruptedError("it was killed"))

    def close(self) -> None:
        """End the process and everything it started."""
        with suppress(RankFailed):
            self._ranks.close()
