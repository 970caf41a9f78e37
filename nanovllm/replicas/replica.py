"""One replica as the front sees it: its process, and what it reports."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from typing import Any, NamedTuple

from nanovllm.metrics import Gauge, Metric
from nanovllm.parallel.ranks import Ranks
from nanovllm.parallel.watch import RankFailed
from nanovllm.replicas import messages

PROGRAM = "nanovllm.replicas.server"


class ReplicaFailed(RuntimeError):
    """A replica has ended, hangs, or a step of it has failed. The message names it."""


class Event(NamedTuple):
    """A message of a replica, or its failure."""

    replica: Replica
    name: str
    payload: bytes
    failure: Exception | None = None


class Replica:
    """An engine in a process of its own. Events appear in `inbox`, in their order.

    The front's thread uses it; `read_metrics` may be called by any thread.
    """

    def __init__(self, index: int, setup: dict[str, Any], inbox: queue.SimpleQueue[Event]) -> None:
        """Start the process, without waiting for it. Raises OSError."""
        self.index, self.name = index, f"replica {index}"
        self.failure: Exception | None = None  # once the front has taken the event
        self._asking = threading.Lock()
        self._metrics: list[Metric] = []  # when they were last read
        self._ranks = Ranks.start(
            setup,
            2,  # this process and the replica's
            PROGRAM,
            names=("the process of LLM", self.name),
            received=lambda name, payload: inbox.put(Event(self, name, payload)),
        )
        self._ranks.call_on_failure(lambda error: inbox.put(Event(self, "", b"", error)))

    @property
    def pid(self) -> int:
        return self._ranks.pids[0]

    def tell(self, name: str, payload: bytes = b"") -> bool:
        """Send a message. False if the replica has failed: its event then follows."""
        try:
            self._ranks.tell(name, payload)
        except (RankFailed, ValueError):
            return False
        return True

    def read_metrics(self) -> list[Metric]:
        """The engine's metrics; of a replica that has ended, the last that are known, at 0 for what
        it does now."""
        with self._asking:
            try:
                (payload,) = self._ranks.ask(messages.METRICS)
                self._metrics = messages.metrics(payload)
            except (RankFailed, ValueError):
                self._metrics = [
                    Gauge(one.name, 0, one.labels) if isinstance(one, Gauge) else one
                    for one in self._metrics
                ]
            return self._metrics

    def begin_close(self) -> None:
        """Begin what `close` does, for a caller that closes several."""
        self._ranks.begin_close()

    def close(self) -> None:
        """End the process. Nothing of it is left."""
        with suppress(RankFailed):
            self._ranks.close()
