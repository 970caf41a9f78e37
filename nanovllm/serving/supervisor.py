"""Starts a server's processes, forwards signals, and ends all processes together.

The engine process and the API processes are children of the supervisor, which handles no requests.
If a process dies, the server ends: its clients' requests are lost in any case, and the server can
be started again from outside.
"""

from __future__ import annotations

import logging
import math
import queue
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from nanovllm import programs
from nanovllm.checks import to_options
from nanovllm.config import EngineConfig
from nanovllm.parallel.errors import RankFailed, without_name
from nanovllm.parallel.ranks import WorkerGroup
from nanovllm.serving import admission
from nanovllm.serving.engine_process import EngineProcess

logger = logging.getLogger(__name__)

PROGRAM = "nanovllm.serving.api_process"
DRAIN, DONE = "drain", "done"  # messages between the supervisor and API processes
# Time for API processes to close their connections after the requests' time is over, and to inform
# clients after the engine has ended.
TICK_SECONDS = 0.25
GRACE_SECONDS = 3.0
FAREWELL_SECONDS = 1.0


@dataclass(frozen=True)
class ServerProcesses:
    """A server's parts.

    target: "package.module:function", which API processes run (see `api_process`); they find the
    package in the same folder as this process. options: their arguments, JSON. listener: a
    listening socket for all of them. drain_timeout: the seconds that running requests get after
    SIGTERM. max_queued: that of `Client`. shared_bytes: the size of memory that all API processes
    share, initially zero.
    """

    config: EngineConfig
    target: str
    listener: socket.socket
    options: Mapping[str, Any] = field(default_factory=dict)
    num_api_processes: int = 1
    drain_timeout: float = 30.0
    max_queued: int = admission.MAX_QUEUED
    shared_bytes: int = 0


@dataclass(frozen=True)
class _Event:
    """A signal, a failed process, or an API process whose function has returned."""

    signal: int = 0
    failure: Exception | None = None
    done: int | None = None


class Supervisor:
    """Runs a service. Use it in the main thread, once."""

    def __init__(self, service: ServerProcesses) -> None:
        self._service = service
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._engine: EngineProcess | None = None
        self._processes: list[WorkerGroup] = []

    def run(self) -> int:
        """Start all processes and wait for the end. Returns the exit code.

        0: SIGTERM or SIGINT, after running requests have finished or drain_timeout has passed. 130:
        a second SIGINT, which ends everything at once. 1: a process failed; the log has the reason.
        No process is left in any case. Raises OSError, and ValueError for options that a process
        refuses.
        """
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            stack.callback(self._close)
            self._start()
            return self._watch()

    def _start(self) -> None:
        service, num = self._service, self._service.num_api_processes
        self._engine = EngineProcess(service.config, num)
        self._engine.call_on_failure(self._note_failure)
        with (
            admission.new_file(num, self._engine.num_engines) as counts,
            tempfile.TemporaryFile() as memory,
        ):
            memory.truncate(service.shared_bytes)
            for index, socks in enumerate(self._engine.clients):
                descriptors = {
                    "listener": service.listener.fileno(),
                    "counts": counts,
                    "memory": memory.fileno(),
                }
                engines = [sock.fileno() for sock in socks]
                self._processes.append(self._start_api_process(index, descriptors, engines))
                for sock in socks:
                    sock.close()

    def _start_api_process(
        self, index: int, descriptors: dict[str, int], engines: list[int]
    ) -> WorkerGroup:
        """engines: the descriptors of its sockets, as `EngineProcess.clients` has them."""
        service = self._service
        setup = {
            "target": service.target,
            "folder": programs.folder_of(service.target.partition(":")[0]),
            "options": dict(service.options),
            "engine": to_options(service.config),
            "index": index,
            "num": service.num_api_processes,
            "inherited": descriptors,
            "engines": engines,
            "drain_timeout": service.drain_timeout,
            "max_queued": service.max_queued,
            "environment": {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},  # torch is not needed
        }
        process = WorkerGroup.start(
            setup,
            2,  # this process and the new one
            PROGRAM,
            names=("the supervisor", f"API process {index}"),
            received=lambda name, payload: self._events.put(_Event(done=index)),
            inherited=[*descriptors.values(), *engines],
        )
        process.call_on_failure(lambda failure: self._note_failure(without_name(failure)))
        return process

    def _watch(self) -> int:
        """Wait for the first event, and end the server accordingly."""
        event = self._next(math.inf)
        assert event is not None
        if event.done is not None:
            logger.error("API process %d has ended unexpectedly", event.done)
            return 1
        if event.failure is not None:
            self._fail(event.failure)
            return 1
        service = self._service
        logger.info("shutting down: running requests have %g seconds", service.drain_timeout)
        return self._drain(service.drain_timeout + GRACE_SECONDS)

    def _fail(self, failure: Exception) -> None:
        """Log why the server ends, and let API processes inform their clients."""
        if isinstance(failure, ValueError):
            raise failure
        logger.error("shutting down: %s", failure)
        self._drain(FAREWELL_SECONDS)

    def _drain(self, seconds: float) -> int:
        """Let API processes finish running requests, and wait for them. Returns the exit code."""
        self._service.listener.close()  # it exists until the API processes close it
        for process in self._processes:
            with suppress(RankFailed):
                process.send(DRAIN)
        waiting, deadline = set(range(len(self._processes))), time.monotonic() + seconds
        while waiting:
            event = self._next(deadline)
            if event is None:
                logger.warning("%d API processes have not ended in time", len(waiting))
                return 0
            if event.failure is not None:
                logger.error("shutting down: %s", event.failure)
                return 1
            if event.signal == signal.SIGINT:
                self._kill()
                return programs.INTERRUPTED
            waiting.discard(-1 if event.done is None else event.done)
        return 0

    def _next(self, deadline: float) -> _Event | None:
        """Wait for the next event; None at the deadline.

        Python runs signal handlers in this thread. A signal that another thread received does not
        wake this one, so it polls.
        """
        while (seconds := deadline - time.monotonic()) > 0:
            with suppress(queue.Empty):
                return self._events.get(timeout=min(seconds, TICK_SECONDS))
        return None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into events."""

        def note(number: int, frame: FrameType | None) -> None:
            self._events.put(_Event(signal=number))

        before = {one: signal.signal(one, note) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_failure(self, failure: Exception) -> None:
        self._events.put(_Event(failure=failure))

    def _kill(self) -> None:
        assert self._engine is not None
        self._engine.kill()
        for process in self._processes:
            process.fail(InterruptedError("the server was interrupted"))

    def _close(self) -> None:
        """End all processes. Healthy ones get a few seconds to exit."""
        for process in self._processes:
            process.begin_close()
        if self._engine is not None:
            self._engine.close()
        for process in self._processes:
            with suppress(RankFailed):
                process.close()
