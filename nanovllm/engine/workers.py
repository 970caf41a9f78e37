"""Processes that build buckets for a store, and the way they are asked: a line of JSON for each bucket, there and back.

At DEBUG the log has what each process wrote to its own, when it was ready, and what each bucket took.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.engine.runner import Layout
from nanovllm.models.config import ModelConfig

logger = logging.getLogger(__name__)

Process = subprocess.Popen[str]
Bucket = tuple[str, int]  # ("prefill", tokens) or ("decode", rows)


@dataclass(frozen=True)
class Outcome:
    """One bucket's: programs and kernels that were compiled, programs that were there already, and what it took in all."""

    bucket: Bucket
    programs: int
    found: int
    kernels: int
    seconds: float


class WorkerFailed(RuntimeError):
    """A process that fills the store ended early; the message is what it wrote."""


def buckets_of(layout: Layout) -> list[Bucket]:
    """All buckets, those first that take longest to build."""
    return [("prefill", size) for size in reversed(layout.prefill_tokens)] + [
        ("decode", size) for size in reversed(layout.decode_rows)
    ]


class Workers:
    """Processes that build buckets; started at once, so that the caller can do something else meanwhile."""

    def __init__(
        self, config: EngineConfig, buckets: Sequence[Bucket], count: int, started: Sequence[Process] = ()
    ) -> None:
        """`count` processes, those already `started` among them."""
        self._waiting: queue.SimpleQueue[Bucket] = queue.SimpleQueue()
        for bucket in buckets:
            self._waiting.put(bucket)
        self._done: queue.SimpleQueue[Outcome | WorkerFailed | None] = queue.SimpleQueue()
        job = json.dumps({**asdict(config), "compile_cache": config.compile_cache and str(config.compile_cache)})
        self._created = time.perf_counter()
        count = min(count, len(buckets))
        self._processes = [*started[:count], *(start() for _ in range(count - len(started)))]
        end(started[count:])
        self._threads = [
            threading.Thread(target=self._feed, args=(number, process, job), daemon=True)
            for number, process in enumerate(self._processes)
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
        if failures:
            raise failures[0]
        return outcomes

    def close(self) -> None:
        """End processes that still run."""
        end(self._processes)

    def _feed(self, number: int, process: Process, job: str) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        said: list[str] = []

        def listen() -> None:
            for line in process.stderr or ():
                said.append(line)
                self._log(number, "%s", line.rstrip())

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            process.stdin.write(job + "\n")
            process.stdin.flush()
            ready = ", ".join(f"{name} {seconds:.2f}" for name, seconds in json.loads(_line(process)).items())
            self._log(number, "is ready: %s s", ready)
            while True:
                try:
                    bucket = self._waiting.get_nowait()
                except queue.Empty:
                    break
                process.stdin.write(json.dumps(bucket) + "\n")
                process.stdin.flush()
                (kind, size), *numbers = json.loads(_line(process))
                outcome = Outcome((kind, size), *numbers)
                self._log(number, "%s", outcome)
                self._done.put(outcome)
            process.stdin.close()
            process.wait()
        except (OSError, ValueError):
            process.kill()
            process.wait()
            listener.join(5)
            self._done.put(WorkerFailed("".join(said)[-2000:].strip() or f"ended with {process.returncode}"))
        finally:
            self._done.put(None)

    def _log(self, number: int, message: str, *args: object) -> None:
        logger.debug(f"worker %d, %.2f s: {message}", number, time.perf_counter() - self._created, *args)


def _line(process: Process) -> str:
    """What a process writes next; raises BrokenPipeError where it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BrokenPipeError
    return line


def start() -> Process:
    """A process that imports what it needs and waits for its first line."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "nanovllm.engine.precompile", str(time.time())]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env.for_children())


def end(processes: Sequence[Process]) -> None:
    for process in processes:
        process.kill()


def bytes_of_one(model: ModuleType, cfg: ModelConfig, layout: Layout) -> int:
    """Device memory that one process takes, about: embedding, head, one layer, its largest step, and the device's context."""
    outer = [param.shape for param in model.outer_params(cfg).values()]
    layer = [param.shape for param in model.layer_params(cfg, 0).values()]
    scratch = layout.prefill_tokens[-1] * (4 * cfg.ffn_size + 8 * cfg.hidden_size + 3 * cfg.qkv_size)
    return (sum(map(math.prod, outer + layer)) + scratch) * cfg.dtype.itemsize + (1 << 30)
