"""Processes that fill a store, and the way they are asked: a line of JSON for each task, there and back.

At DEBUG the log has what each process wrote to its own, when it was ready, and what each bucket took.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.engine.runner import Layout
from nanovllm.models.config import ModelConfig
from nanovllm.platforms import forking

logger = logging.getLogger(__name__)

Bucket = tuple[str, int]  # ("prefill", tokens) or ("decode", rows)
ANSWER = "nanovllm: "  # before the JSON of an answer: what a process imports may print as well (torch_npu does)


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


class Tasks:
    """What is to be done, for several threads: the first first, and the end once all is done and nothing new came of it."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._waiting = sorted(tasks)
        self._open = len(tasks)  # waiting or being done
        self._changed = threading.Condition()

    def take(self) -> Task | None:
        """The next one, which must be closed by `done`; waits where one may still come, and returns None where none will."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._open)
            return heapq.heappop(self._waiting) if self._waiting else None

    def done(self, *following: Task) -> None:
        """One is done, or will not be; `following` came of it."""
        with self._changed:
            for task in following:
                heapq.heappush(self._waiting, task)
            self._open += len(following) - 1
            self._changed.notify_all()


class WorkerFailed(RuntimeError):
    """A process that fills the store ended early; the message is what it wrote."""


def buckets_of(layout: Layout) -> list[Bucket]:
    """All buckets, those first that take longest to build."""
    return [("prefill", size) for size in reversed(layout.prefill_tokens)] + [
        ("decode", size) for size in reversed(layout.decode_rows)
    ]


class Process:
    """A process that builds buckets, and the pipes by which it is asked. Several may be forked from one, their `parent`."""

    def __init__(self, parent: subprocess.Popen[bytes], stdin: int, stdout: int, stderr: int) -> None:
        self.parent = parent
        self.stdin, self.stdout, self.stderr = os.fdopen(stdin, "w"), os.fdopen(stdout), os.fdopen(stderr)

    def ask(self, request: object) -> Any:
        """Its answer to a line; raises BrokenPipeError where it has ended."""
        self.stdin.write(json.dumps(request) + "\n")
        self.stdin.flush()
        return self.next()

    def next(self) -> Any:
        """The next answer that it writes; raises BrokenPipeError where it has ended."""
        line = next((line for line in self.stdout if line.startswith(ANSWER)), None)
        if line is None:
            raise BrokenPipeError
        return json.loads(line.removeprefix(ANSWER))

    def dismiss(self) -> None:
        """It ends by itself once it has done what it was asked."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.stdin.close()


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
        self._tasks = Tasks([Task((0, number), verb, bucket) for number, bucket in enumerate(buckets)])
        self._kernels: set[str] = set()
        self._lock = threading.Lock()
        self._done: queue.SimpleQueue[Outcome | WorkerFailed | None] = queue.SimpleQueue()
        self._created = time.perf_counter()
        count = min(count, len(buckets))
        self._processes = [*started, *start(config, count - len(started))]
        for process in self._processes[count:]:
            process.dismiss()
        self._threads = [
            threading.Thread(target=self._feed, args=(number, process), daemon=True)
            for number, process in enumerate(self._processes[:count])
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, progress: Callable[[Outcome], object]) -> list[Outcome]:
        """All outcomes, as they come; raises WorkerFailed once the other processes have done what they could."""
        outcomes: list[Outcome] = []
        failures: list[WorkerFailed] = []
        running = len(self._threads)
        while running:
            event = self._done.get()
            if event is None:
                running -= 1
            elif isinstance(event, WorkerFailed):
                failures.append(event)
            else:
                outcomes.append(event)
                progress(event)
        end(self._processes, seconds=10)  # what they held of the device is free once they are gone
        if failures:
            raise max(failures, key=lambda failure: len(str(failure)))  # who fails with another has less to say
        return outcomes

    def close(self) -> None:
        """End processes that still run."""
        end(self._processes)

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
            while (task := self._tasks.take()) is not None:
                following: list[Task] = []
                try:
                    answer = process.ask([task.verb, task.what])
                    if task.verb == "compile":
                        self._log(number, "a kernel in %.3f s", answer)
                        continue
                    outcome = Outcome(task.what, *answer["numbers"])
                    following = self._new_kernels(answer["kernels"])
                    self._log(number, "%s, %d new kernels", outcome, len(following))
                    self._done.put(outcome)
                finally:
                    self._tasks.done(*following)
        except (OSError, ValueError):
            listener.join(5)
            self._done.put(WorkerFailed("".join(said)[-2000:].strip() or "it ended without a word"))
        finally:
            process.dismiss()
            self._done.put(None)

    def _new_kernels(self, found: dict[str, int]) -> list[Task]:
        """Tasks for those that no other bucket has asked for, the longest first."""
        with self._lock:
            new = [request for request in found if request not in self._kernels]
            self._kernels.update(new)
        return [Task((1, -found[request]), "compile", request) for request in new]

    def _log(self, number: int, message: str, *args: object) -> None:
        logger.debug(f"worker %d, %.2f s: {message}", number, time.perf_counter() - self._created, *args)


def start(config: EngineConfig, count: int) -> list[Process]:
    """Processes that import what they need, make the device ready, and wait for their first bucket.

    On Linux they are forked from one process that has imported it all: an import is some thousands of files, which on a slow
    file system take a dozen processes at once longer than compiling does.
    """
    if count < 1:
        return []
    job = json.dumps({**asdict(config), "compile_cache": config.compile_cache and str(config.compile_cache)})
    groups = [count] if sys.platform == "linux" else [1] * count
    return [process for size in groups for process in _spawn(job, size)]


def _spawn(job: str, count: int) -> list[Process]:
    """One process, and with more than one its forks: each has the ends of three pipes, which are numbers in its command."""
    forks = count > 1
    pipes = [[os.pipe() for _ in range(3)] for _ in range(count)]
    theirs = [(stdin[0], stdout[1], stderr[1]) for stdin, stdout, stderr in pipes]
    stdin, stdout, stderr = theirs[0]
    command = [sys.executable, "-m", "nanovllm.engine.precompile", str(time.time()), job]
    parent = subprocess.Popen(
        [*command, *(",".join(map(str, ends)) for ends in theirs if forks)],
        stdin=subprocess.DEVNULL if forks else stdin,
        stdout=subprocess.DEVNULL if forks else stdout,
        stderr=stderr,  # of those that fork as well: should an import fail, the first says so
        pass_fds=[end for ends in theirs for end in ends] if forks else (),
        env={**env.for_children(), **(forking.ENVIRONMENT if forks else {})},
        start_new_session=forks,  # so that all can be ended at once
    )
    for end in (end for ends in theirs for end in ends):
        os.close(end)
    return [Process(parent, stdin[1], stdout[0], stderr[0]) for stdin, stdout, stderr in pipes]


def end(processes: Sequence[Process], seconds: float = 0) -> None:
    """End processes, and those that are forked from the same ones, if they do not end by themselves within `seconds`."""
    for process in processes:
        process.dismiss()
    for parent in {process.parent for process in processes}:
        try:
            parent.wait(seconds)  # it waits for its forks
        except subprocess.TimeoutExpired:
            if os.name == "posix" and os.getpgid(parent.pid) == parent.pid:
                os.killpg(parent.pid, signal.SIGKILL)
            else:
                parent.kill()
            parent.wait()


def bytes_of_one(model: ModuleType, cfg: ModelConfig, layout: Layout) -> int:
    """Device memory that one process takes, about: embedding, head, two layers, its largest step, and the device's context."""
    outer = [param.shape for param in model.outer_params(cfg).values()]
    layer = [param.shape for param in model.layer_params(cfg, 0).values()]
    scratch = layout.prefill_tokens[-1] * (4 * cfg.ffn_size + 8 * cfg.hidden_size + 3 * cfg.qkv_size)
    return (sum(map(math.prod, outer + 2 * layer)) + scratch) * cfg.dtype.itemsize + (1 << 30)
