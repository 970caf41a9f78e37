"""The main process's side of the workers: starts them, and hands them tasks, one thread per worker.

At DEBUG the log has, with the seconds since `build`, each worker's own log, when it was ready, and
how long each task took. Importing this module does not import torch.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.platforms import preload
from nanovllm.startup.compile_farm.fork_server import ForkServer
from nanovllm.startup.compile_farm.tasks import Bucket, BuildOutcome, Task, TaskQueue
from nanovllm.startup.compile_farm.worker_handle import WorkerProcess, end_all, spawn

logger = logging.getLogger(__name__)

LOG_CHARACTERS = 2000  # of a failed worker's log in the error message


class WorkerFailed(RuntimeError):
    """A worker exited early or stopped answering. The message is its log's end or its task."""


class _WorkerEvent(Enum):
    """What a worker's thread reports besides outcomes and failures."""

    ANSWERED = 0
    FINISHED = 1


class CompileFarm:
    """Worker processes that compile into the store of `config` while this process does other work.

    `start` may be called before torch is imported, `start_workers` once the device is known, and
    `build` once the buckets are; then `wait`. `close` ends everything, at any time.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._server: ForkServer | None = None
        self._workers: list[WorkerProcess] = []
        self._threads: list[threading.Thread] = []
        self._tasks = TaskQueue(())
        self._known_kernels: set[str] = set()
        self._lock = threading.Lock()
        self._events: queue.SimpleQueue[BuildOutcome | WorkerFailed | _WorkerEvent] = (
            queue.SimpleQueue()
        )
        self._current: dict[int, Task] = {}  # by the number of the worker
        self._has_warned = False
        self._used_device = False
        self._built_at = 0.0

    @classmethod
    def start(cls, config: EngineConfig) -> CompileFarm:
        """A new farm, which starts importing if there is probably a GPU and the store is empty."""
        farm = cls(config)
        most = preload.max_processes()
        if most >= 2 and _is_likely_needed(config):
            farm._server = ForkServer(config, most)
        return farm

    def start_workers(self, count: int) -> None:
        """Start workers, up to `count` in all, which import and wait. 0 ends the fork server."""
        server, self._server = self._server, None
        count -= len(self._workers)
        if server is not None and count <= 0:
            server.end()
        elif server is not None or (count > 1 and sys.platform == "linux"):
            server = server or ForkServer(self._config, count)
            self._workers += server.fork(count)
        else:
            self._workers += [spawn(self._config) for _ in range(count)]

    def build(self, buckets: Sequence[Bucket], count: int, *, dry_run: bool = False) -> None:
        """Build `buckets` in this order with `count` workers; returns at once.

        With `dry_run` workers determine the kernels of a bucket without running it, where
        possible, and then compile each kernel once.
        """
        self._built_at = time.perf_counter()
        verb = "dry_run" if dry_run else "run"
        tasks = [Task((0, number), verb, bucket) for number, bucket in enumerate(buckets)]
        self._tasks = TaskQueue(tasks)
        count = min(count, len(buckets))
        self.start_workers(count)
        for worker in self._workers[count:]:
            worker.dismiss()
        for number, worker in enumerate(self._workers[:count]):
            thread = threading.Thread(target=self._serve, args=(number, worker), daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait(
        self, progress: Callable[[BuildOutcome], object], patience_s: float | None = None
    ) -> list[BuildOutcome]:
        """Wait for all buckets and kernels; `progress` gets each outcome as it comes.

        Raises WorkerFailed for a failed worker, after the others have done the rest. Also raises it
        if no worker answers for `patience_s` seconds, after killing all of them.
        """
        outcomes: list[BuildOutcome] = []
        failures: list[WorkerFailed] = []
        num_running = len(self._threads)
        while num_running:
            try:
                event = self._events.get(timeout=patience_s)
            except queue.Empty:
                current = "; ".join(map(str, list(self._current.values()))) or "becoming ready"
                self.close()
                raise WorkerFailed(
                    f"for {patience_s:.0f} s there was no answer; still at work: {current}"
                ) from None
            if event is _WorkerEvent.FINISHED:
                num_running -= 1
            elif isinstance(event, WorkerFailed):
                failures.append(event)
            elif isinstance(event, BuildOutcome):
                outcomes.append(event)
                progress(event)
        if self._used_device:
            end_all(self._workers, seconds=10)  # their device memory is free once they have ended
        if failures:
            # Raise the longest message: it is usually the root cause.
            raise max(failures, key=lambda failure: len(str(failure)))
        return outcomes

    def close(self) -> None:
        """Kill all running processes."""
        server, self._server = self._server, None
        if server is not None:
            server.end()
        end_all(self._workers)

    def _serve(self, number: int, worker: WorkerProcess) -> None:
        """One worker's thread: hand it tasks until the queue ends."""
        lines: list[str] = []
        listener = threading.Thread(target=self._listen, args=(number, worker, lines), daemon=True)
        listener.start()
        try:
            seconds = worker.next_answer()
            ready = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
            self._log(number, "is ready: %s s", ready)
            self._events.put(_WorkerEvent.ANSWERED)
            while (task := self._tasks.take()) is not None:
                self._do(number, worker, task)
        except (OSError, ValueError):
            listener.join(5)
            message = "".join(lines)[-LOG_CHARACTERS:].strip()
            self._events.put(WorkerFailed(message or "it exited without output"))
        finally:
            worker.dismiss()
            self._events.put(_WorkerEvent.FINISHED)

    def _listen(self, number: int, worker: WorkerProcess, lines: list[str]) -> None:
        for line in worker.stderr:
            lines.append(line)
            self._log(number, "%s", line.rstrip())

    def _do(self, number: int, worker: WorkerProcess, task: Task) -> None:
        kernels: list[Task] = []
        self._current[number] = task
        try:
            answer = worker.call([task.verb, task.what])
            if task.is_kernel:
                self._log(number, "a kernel in %.3f s", answer)
                self._events.put(_WorkerEvent.ANSWERED)
                return
            outcome = BuildOutcome(task.what, *answer["numbers"])
            kernels = self._new_kernels(answer["kernels"])
            self._log(number, "%s, %d new kernels", outcome, len(kernels))
            self._used_device |= answer["has_run"]
            if answer["problem"] is not None:
                self._warn_once(task, answer["problem"])
            self._events.put(outcome)
        finally:
            del self._current[number]
            self._tasks.done(task, *kernels)

    def _new_kernels(self, found: dict[str, int]) -> list[Task]:
        """Tasks for kernels that no other bucket has requested, the longest first."""
        with self._lock:
            new = [request for request in found if request not in self._known_kernels]
            self._known_kernels.update(new)
        return [Task((1, -found[request]), "compile", request) for request in new]

    def _warn_once(self, task: Task, problem: str) -> None:
        with self._lock:
            has_warned, self._has_warned = self._has_warned, True
        if not has_warned:  # other buckets have the same problem
            message = "a start takes longer, as %s %d cannot be dry-run and is run: %s"
            logger.warning(message, *task.what, problem)

    def _log(self, number: int, message: str, *args: object) -> None:
        seconds = time.perf_counter() - self._built_at
        logger.debug(f"worker %d, %.2f s: {message}", number, seconds, *args)


def _is_likely_needed(config: EngineConfig) -> bool:
    """Whether a start with these options seems to compile: a GPU's driver and an empty store."""
    if config.enforce_eager or config.compile_cache_mode != "auto":
        return False
    if not preload.may_have_gpu(config.device):
        return False
    entries = env.read().store_folder(config.compile_cache) / "entries"
    try:
        return not entries.is_dir() or not any(entries.iterdir())
    except OSError:  # opening the store raises the error again, with a message
        return False
