"""The router's interface to a replica, wherever it runs, and to its events."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from nanovllm.engine.metrics import Metric
from nanovllm.replicas import messages
from nanovllm.replicas.metric_aggregation import LastMetrics

if TYPE_CHECKING:
    from nanovllm.tokenizer import Tokenizer


class ReplicaFailed(RuntimeError):
    """A replica has ended or hangs, or one of its steps has failed. The message names it."""


class Event(NamedTuple):
    """A message from a replica, or its failure."""

    replica: Replica
    name: str
    payload: bytes
    failure: Exception | None = None


Inbox = queue.SimpleQueue[Event]


class Replica(ABC):
    """An engine in another process. Its events go to an `Inbox`, in order.

    Only the router's thread uses it, except `read_metrics`, which any thread may call.

    setup: the arguments of its program (`setups.setup`).
    """

    def __init__(self, index: int, setup: dict[str, Any]) -> None:
        self.index, self.name = index, str(setup["name"])
        # the index of the replica that compiles for this one; None: this one compiles
        self.waits_for: int | None = setup["waits_for"]
        self.is_ready = False  # it is warm and has not failed
        self.failure: Exception | None = None  # once the router has taken the event
        self._asking = threading.Lock()
        self._metrics = LastMetrics()

    @abstractmethod
    def send(self, name: str, payload: bytes = b"") -> bool:
        """Send a message. False if the replica has failed; its event follows."""

    @abstractmethod
    def ask_metrics(self) -> bytes:
        """The engine's metrics as a `messages` payload. Raises ReplicaFailed."""

    @abstractmethod
    def begin_close(self) -> None:
        """Start `close` without waiting, for a caller that closes several replicas."""

    @abstractmethod
    def close(self) -> None:
        """End the engine and everything it started."""

    def follow(self, lost: Replica) -> None:
        """Count on from a lost replica, in whose place this one has been started."""
        self._metrics.follow(lost._metrics)

    def read_metrics(self) -> list[Metric]:
        """The engine's metrics; of one that has ended, or is not ready, the last that are known, at
        0 for what it does now."""
        with self._asking:
            try:
                if self.is_ready:
                    self._metrics.note(messages.load_metrics(self.ask_metrics()))
            except ReplicaFailed:
                self._metrics.rest()
            return self._metrics.all


class Starter(Protocol):
    """Starts the replicas of one router."""

    def start(
        self, index: int, inbox: Inbox, clients: Sequence[int] = (), *, again: bool = False
    ) -> Replica:
        """Start a replica without waiting for it. Raises OSError.

        clients: file descriptors of sockets to its clients. again: after it was lost, so it waits
        for what no other replica compiles.
        """

    def tokenizer(self) -> Tokenizer | None:
        """The replicas' tokenizer."""

    def close(self) -> None:
        """Release what the replicas share, after they are closed."""
