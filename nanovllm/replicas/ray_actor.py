"""The Ray actor of a replica: runs the replica's process on its node and relays messages.

Its arguments and results are numbers, names and bytes: nothing of ours is pickled. The engine runs
in a child process, as on one machine, so that the actor can detect that it died or hangs, keep its
last lines of output, and respond to the router meanwhile. Importing this module does not import
torch or Ray.
"""

from __future__ import annotations

import json
import queue
import threading
from contextlib import suppress

from nanovllm import log, programs
from nanovllm.parallel.channel import Message, pack
from nanovllm.parallel.serve import ERROR, error_bytes
from nanovllm.replicas.process_replica import ProcessReplica
from nanovllm.replicas.replica import Event, Inbox, ReplicaFailed

POLL_S = 1.0  # `receive` returns after this time to show that the actor is alive
NUM_THREADS = 8  # concurrent calls; few of them wait


class ReplicaActor:
    """The actor. Ray calls it from several threads."""

    def __init__(self, index: int, setup: bytes) -> None:
        """Start the replica's process. `setup` is `setups.setup` as JSON."""
        programs.begin()
        log.configure()
        self._inbox: Inbox = queue.SimpleQueue()
        self._replica = ProcessReplica(index, json.loads(setup), self._inbox)
        self._order = threading.Lock()
        self._early: dict[int, Message] = {}  # messages that arrived before earlier ones
        self._num_told = 0

    def send(self, number: int, name: str, payload: bytes) -> None:
        """Forward a message. Ray may reorder calls, so messages are numbered from 0."""
        with self._order:
            self._early[number] = name, payload
            while (message := self._early.pop(self._num_told, None)) is not None:
                self._num_told += 1
                self._replica.send(*message)  # a failure is reported as an event

    def receive(self) -> bytes:
        """Packed messages of the replica; empty if there are none for POLL_S. A failure is an ERROR
        message."""
        found = bytearray()
        with suppress(queue.Empty):
            found += _packed(self._inbox.get(timeout=POLL_S))
            while True:
                found += _packed(self._inbox.get_nowait())
        return bytes(found)

    def metrics(self) -> bytes:
        """The engine's metrics; b"" if it has failed."""
        try:
            return self._replica.ask_metrics()
        except ReplicaFailed:
            return b""

    def close(self) -> None:
        """End the replica's process and everything it started."""
        self._replica.close()


def _packed(event: Event) -> bytes:
    if event.failure is not None:
        return pack(ERROR, error_bytes(event.failure))
    return pack(event.name, event.payload)
