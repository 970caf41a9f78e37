"""Answers rows with several engines, each in a Ray actor.

Plain actors, not Ray Data: that endlessly retries a task that kills its actor, so one bad row would
block the whole job.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from nanovllm import log, programs
from nanovllm.batch.chunks import Chunk, Chunks
from nanovllm.batch.results import Result
from nanovllm.batch.rows import Line
from nanovllm.batch.worker import EngineWorker, Settings, load_engine
from nanovllm.config import EngineConfig
from nanovllm.replicas import cluster

logger = logging.getLogger(__name__)

CHUNKS_IN_FLIGHT = 8  # per replica, to fill its batches
POLL_S = 5.0
PLACE_S = 120.0  # the longest time without any replica placed in the cluster
MAX_LOSSES = 8  # consecutive losses of replicas without an answered chunk in between


class Replica:
    """The actor: an engine, and a thread for each chunk in flight."""

    def place(self) -> None:
        """Returns once the actor is placed in the cluster."""

    def load(self, config: EngineConfig, settings: Settings) -> None:
        programs.begin()
        log.configure()
        self._shared, self._settings = load_engine(config), settings

    def answer(self, lines: list[Line]) -> list[Result]:
        worker = EngineWorker(self._shared, self._settings)
        try:
            return worker.answer(lines)
        finally:
            worker.close()


@dataclass
class _Handle:
    """The driver's side of a replica. `calls`: its chunks, by Ray reference; None for `place` and
    `load`."""

    number: int
    actor: Any
    calls: dict[Any, Chunk | None] = field(default_factory=dict)
    is_placed: bool = False
    is_loaded: bool = False

    @property
    def may_take(self) -> bool:
        chunks = self.calls.values()
        has_suspect = any(chunk is not None and chunk.is_suspect for chunk in chunks)
        return self.is_loaded and not has_suspect and len(chunks) < CHUNKS_IN_FLIGHT


class Replicas:
    """The replicas of a job. A lost one is replaced, and its rows are retried."""

    def __init__(
        self,
        config: EngineConfig,
        settings: Settings,
        num: int,
        num_rows: int,
        *,
        address: str | None = None,
    ) -> None:
        """Connect to a cluster (see `cluster.connect`), and start loading.

        Raises ValueError if Ray is missing or the cluster is too small.
        """
        self._config, self._settings = config, settings
        self._ray = ray = cluster.connect(address, "--replicas (without --no-ray)")
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            options = cluster.share(config, num, nodes)
            self._actor_class = ray.remote(Replica).options(
                max_concurrency=CHUNKS_IN_FLIGHT, max_restarts=0, max_task_retries=0, **options
            )
            self._chunks = Chunks(num_rows, num)
            self._finished: list[Result] = []
            self._num_losses = 0  # since the last answered chunk
            self._has_answered = False
            self._placed_at = time.monotonic()
            self._handles = [self._start(number) for number in range(num)]
        except BaseException:
            ray.shutdown()
            raise

    def _start(self, number: int) -> _Handle:
        handle = _Handle(number, self._actor_class.remote())
        handle.calls[handle.actor.place.remote()] = None
        return handle

    def close(self) -> None:
        """End all replicas, and the cluster if this job started it."""
        for handle in self._handles:
            self._kill(handle)
        self._ray.shutdown()

    def has_room(self) -> bool:
        return self._chunks.has_room()

    def submit(self, line: Line) -> None:
        self._chunks.add(line)

    def wait(self) -> list[Result]:
        """Raises ValueError if the first replicas cannot load the model, and RuntimeError if no
        replica can be placed in the cluster, or if too many are lost in a row."""
        if self._chunks.has_room():  # no more lines will come until some are finished
            self._chunks.flush()
        self._give_out()
        owners = {call: handle for handle in self._handles for call in handle.calls}
        done, _ = self._ray.wait(list(owners), num_returns=1, timeout=POLL_S)
        for call in done:
            if call in owners[call].calls:  # else another call reported the replica as lost
                self._collect(owners[call], call)
        self._check_places()
        finished, self._finished = self._finished, []
        return finished

    def _give_out(self) -> None:
        """Assign waiting chunks to replicas, to the least busy one first."""
        while ready := [handle for handle in self._handles if handle.may_take]:
            handle = min(ready, key=lambda one: len(one.calls))
            chunk = self._chunks.next_for(is_idle=not handle.calls)
            if chunk is None:
                return
            handle.calls[handle.actor.answer.remote(chunk.lines)] = chunk

    def _collect(self, handle: _Handle, call: Any) -> None:
        """Process the result of a finished call."""
        try:
            result = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if not handle.is_loaded and not self._has_answered:
                raise ValueError(f"a replica cannot load the model: {error.cause}") from None
            self._lost(handle, error)
            return
        except self._ray.exceptions.RayError as error:
            self._lost(handle, error)
            return
        chunk = handle.calls.pop(call)
        if chunk is not None:
            self._finished += result
            self._num_losses, self._has_answered = 0, True
        elif not handle.is_placed:
            handle.is_placed = True
            handle.calls[handle.actor.load.remote(self._config, self._settings)] = None
        else:
            handle.is_loaded = True

    def _lost(self, handle: _Handle, error: Exception) -> None:
        """Take back the chunks of a replica that died or failed, and start another one."""
        reason = " ".join(str(error).split())[:300]
        logger.warning("replica %d is lost, its rows are retried: %s", handle.number, reason)
        self._num_losses += 1
        if self._num_losses >= MAX_LOSSES:
            raise RuntimeError(
                f"{self._num_losses} replicas were lost in a row: {reason}"
            ) from error
        for chunk in handle.calls.values():
            if chunk is not None:
                self._finished += self._chunks.lost(chunk)
        self._kill(handle)
        self._handles[self._handles.index(handle)] = self._start(handle.number)

    def _kill(self, handle: _Handle) -> None:
        with cluster.closing():
            self._ray.kill(handle.actor)

    def _check_places(self) -> None:
        """Raise RuntimeError if no replica has been placed in the cluster for PLACE_S."""
        now = time.monotonic()
        if any(handle.is_placed for handle in self._handles):
            self._placed_at = now
        elif now - self._placed_at > PLACE_S:
            raise RuntimeError(
                f"the Ray cluster had no room for a replica within {PLACE_S:.0f} s: others use its "
                "CPUs or GPUs, or its nodes are gone"
            )
