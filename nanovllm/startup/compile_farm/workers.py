"""What processes that fill a store are asked, and by turns which: a line of JSON for each task, there and back.

At DEBUG the log has what each process wrote to its own, when it was ready, and what each bucket took.
"""

from __future__ import annotations

import heapq
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.models.interface import Model
from nanovllm.runner.spec import EngineSpec, Layout
from nanovllm.startup.compile_farm import processes
from nanovllm.startup.compile_farm.processes import Process

logger = logging.getLogger(__name__)

Bucket = tuple[str, int]  # ("prefill", tokens) or ("decode", rows)


@dataclass(frozen=True)
class Outcome:
    """One bucket's: programs and kernels that were compiled, programs that were there already, and what it took in all."""

    bucket: Bucket
    programs: int
    found: int
    kernels: int
    seconds: float


@dataclass(order=True)
class Task:
    """To "run" or "rehearse" the bucket, or to "compile" the kernel, that `what` names; the smallest `rank` comes first."""

    rank: tuple[int, int]
    verb: str = field(compare=False)
    what: Any = field(compare=False)

    @property
    def is_kernel(self) -> bool:
        """Of which nothing new can come."""
        return self.verb == "compile"

    def __str__(self) -> str:
        return f"{self.verb} {self.what if self.is_kernel else ' '.join(map(str, self.what))}"


class Tasks:
    """What is to be done, for several threads: the first first, and the end once nothing waits and nothing new can come."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._waiting = sorted(tasks)
        self._open = len([task for task in tasks if not task.is_kernel])  # waiting or being done
        self._changed = threading.Condition()

    def take(self) -> Task | None:
        """The next one, which must be closed by `done`; waits where one may still come, and returns None where none will."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._open)
            return heapq.heappop(self._waiting) if self._waiting else None

    def done(self, task: Task, *following: Task) -> None:
        """It is done, or will not be; `following` kernels came of it."""
        with self._changed:
            for kernel in following:
                heapq.heappush(self._waiting, kernel)
            self._open -= not task.is_kernel
            self._changed.notify_all()


class WorkerFailed(RuntimeError):
    """A process that fills the store ended early; the message is what it wrote."""


def buckets_of(layout: Layout) -> list[Bucket]:
    """All buckets, those first that take longest to build."""
    return [("prefill", size) for size in reversed(layout.prefill_tokens)] + [
        ("decode", size) for size in reversed(layout.decode_rows)
    ]


class _Answer(Enum):
    """What else comes of a process: an answer that is no outcome, or the end of them."""

    OTHER = 0
    LAST = 1


class Workers:
    """Processes that build buckets; started at once, so that the caller can do something else meanwhile."""

    def __init__(
        self,
        config: EngineConfig,
        buckets: Sequence[Bucket],
        count: int,
        started: Sequence[Process] = (),
        *,
        rehearse: bool = False,
    ) -> None:
        """`count` processes, those already `started` for the same options among them.

        With `rehearse` buckets are not run where that can be spared: first it is found out which kernels they launch, and then
        every kernel is compiled once, by whoever is free.
        """
        verb = "rehearse" if rehearse else "run"
        self._tasks = Tasks(
            [Task((0, number), verb, bucket) for number, bucket in enumerate(buckets)]
        )
        self._kernels: set[str] = set()
        self._lock = threading.Lock()
        self._done: queue.SimpleQueue[Outcome | WorkerFailed | _Answer] = queue.SimpleQueue()
        self._doing: dict[int, Task] = {}  # by the number of the process
        self._has_warned = False
        self._used_device = False
        self._created = time.perf_counter()
        count = min(count, len(buckets))
        self._processes = [*started, *processes.start(config, count - len(started))]
        for process in self._processes[count:]:
            process.dismiss()
        self._threads = [
            threading.Thread(target=self._feed, args=(number, process), daemon=True)
            for number, process in enumerate(self._processes[:count])
        ]
        for thread in self._threads:
            thread.start()

    def wait(
        self, progress: Callable[[Outcome], object], patience_s: float | None = None
    ) -> list[Outcome]:
        """All outcomes, as they come; raises WorkerFailed once the other processes have done what they could, and, with all
        of them ended, where for `patience_s` seconds there was no answer from any."""
        outcomes: list[Outcome] = []
        failures: list[WorkerFailed] = []
        running = len(self._threads)
        while running:
            try:
                event = self._done.get(timeout=patience_s)
            except queue.Empty:
                doing = (
                    "; ".join(str(task) for task in list(self._doing.values())) or "becoming ready"
                )
                self.close()
                raise WorkerFailed(
                    f"for {patience_s:.0f} s there was no answer; still at work: {doing}"
                ) from None
            if event is _Answer.LAST:
                running -= 1
            elif isinstance(event, WorkerFailed):
                failures.append(event)
            elif isinstance(event, Outcome):
                outcomes.append(event)
                progress(event)
        if self._used_device:
            processes.end(
                self._processes, seconds=10
            )  # what they held of it is free once they are gone
        if failures:
            raise max(
                failures, key=lambda failure: len(str(failure))
            )  # who fails with another has less to say
        return outcomes

    def close(self) -> None:
        """End processes that still run; those that have nothing left to do do so by themselves."""
        processes.end(self._processes)

    def _feed(self, number: int, process: Process) -> None:
        said: list[str] = []

        def listen() -> None:
            for line in process.stderr:
                said.append(line)
                self._log(number, "%s", line.rstrip())

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            ready = ", ".join(f"{name} {seconds:.2f}" for name, seconds in process.next().items())
            self._log(number, "is ready: %s s", ready)
            self._done.put(_Answer.OTHER)
            while (task := self._tasks.take()) is not None:
                following: list[Task] = []
                self._doing[number] = task
                try:
                    answer = process.ask([task.verb, task.what])
                    if task.is_kernel:
                        self._log(number, "a kernel in %.3f s", answer)
                        self._done.put(_Answer.OTHER)
                        continue
                    outcome = Outcome(task.what, *answer["numbers"])
                    following = self._new_kernels(answer["kernels"])
                    self._log(number, "%s, %d new kernels", outcome, len(following))
                    self._used_device |= answer["has_run"]
                    if answer["problem"] is not None:
                        self._warn_once(task, answer["problem"])
                    self._done.put(outcome)
                finally:
                    del self._doing[number]
                    self._tasks.done(task, *following)
        except (OSError, ValueError):
            listener.join(5)
            self._done.put(WorkerFailed("".join(said)[-2000:].strip() or "it ended without a word"))
        finally:
            process.dismiss()
            self._done.put(_Answer.LAST)

    def _new_kernels(self, found: dict[str, int]) -> list[Task]:
        """Tasks for those that no other bucket has asked for, the longest first."""
        with self._lock:
            new = [request for request in found if request not in self._kernels]
            self._kernels.update(new)
        return [Task((1, -found[request]), "compile", request) for request in new]

    def _warn_once(self, task: Task, problem: str) -> None:
        with self._lock:
            has_warned, self._has_warned = self._has_warned, True
        if not has_warned:  # one step's programs are much like another's
            logger.warning(
                "a start takes longer, as %s %d cannot be rehearsed and is run: %s",
                *task.what,
                problem,
            )

    def _log(self, number: int, message: str, *args: object) -> None:
        logger.debug(
            f"worker %d, %.2f s: {message}", number, time.perf_counter() - self._created, *args
        )


def bytes_of_one(model: Model, spec: EngineSpec) -> int:
    """Device memory of one process, about: the reduced model, its largest step, and the device's context."""
    cfg = model.config
    scratch = spec.layout.prefill_tokens[-1] * (
        4 * cfg.ffn_size + 8 * cfg.hidden_size + 3 * cfg.qkv_size
    )
    params = model.reduced().param_bytes(spec.weight_format)
    return params + scratch * cfg.dtype.itemsize + (1 << 30)
