"""A replica as a process on this machine. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from nanovllm.parallel.errors import RankFailed
from nanovllm.parallel.ranks import WorkerGroup
from nanovllm.replicas import messages
from nanovllm.replicas.replica import Event, Inbox, Replica, ReplicaFailed

PROGRAM = "nanovllm.replicas.engine_program"


class ProcessReplica(Replica):
    """An engine in a child process."""

    def __init__(
        self, index: int, setup: dict[str, Any], inbox: Inbox, clients: Sequence[int] = ()
    ) -> None:
        """Start the process without waiting for it. Raises OSError.

        clients: descriptors of its clients' sockets, which it inherits.
        """
        super().__init__(index, setup)
        self._ranks = WorkerGroup.start(
            {**setup, "clients": [list(clients)], "parents": []},
            2,  # this process and the replica's
            PROGRAM,
            names=("the process of LLM", self.name),
            received=lambda name, payload: inbox.put(Event(self, name, payload)),
            inherited=clients,
        )
        self._ranks.call_on_failure(lambda error: inbox.put(Event(self, "", b"", error)))

    @property
    def pid(self) -> int:
        return self._ranks.pids[0]

    def send(self, name: str, payload: bytes = b"") -> bool:
        try:
            self._ranks.send(name, payload)
        except (RankFailed, ValueError):
            return False
        return True

    def ask_metrics(self) -> bytes:
        try:
            return self._ranks.call(messages.METRICS)[0]
        except (RankFailed, ValueError) as error:
            raise ReplicaFailed(str(error)) from error

    def begin_close(self) -> None:
        self._ranks.begin_close()

    def close(self) -> None:
        with suppress(RankFailed):
            self._ranks.close()
