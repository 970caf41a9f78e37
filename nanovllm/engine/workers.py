"""Processes that build buckets for a store, and the way they are asked: a line of JSON for each bucket, there and back."""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.engine.runner import Layout
from nanovllm.models.config import ModelConfig

Process = subprocess.Popen[str]
Bucket = tuple[str, int]  # ("prefill", tokens) or ("decode", rows)
DONE = "nanovllm bucket: "  # before the JSON of an answer: what a process imports may print as well (torch_npu does)


@dataclass(frozen=True)
class Outcome:
    """One bucket's: programs and kernels that were compiled, programs that were there already."""

    bucket: Bucket
    programs: int
    found: int
    kernels: int


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
        count = min(count, len(buckets))
        self._processes = [*started[:count], *(start() for _ in range(count - len(started)))]
        end(started[count:])
        self._threads = [
            threading.Thread(target=self._feed, args=(process, job), daemon=True) for process in self._processes
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

    def _feed(self, process: Process, job: str) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        said: list[str] = []
        listener = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        listener.start()
        try:
            process.stdin.write(job + "\n")
            while True:
                try:
                    bucket = self._waiting.get_nowait()
                except queue.Empty:
                    break
                process.stdin.write(json.dumps(bucket) + "\n")
                process.stdin.flush()
                line = next((line for line in process.stdout if line.startswith(DONE)), None)
                if line is None:
                    raise BrokenPipeError
                (kind, size), *numbers = json.loads(line.removeprefix(DONE))
                self._done.put(Outcome((kind, size), *numbers))
            process.stdin.close()
            process.wait()
        except (OSError, ValueError):
            process.kill()
            process.wait()
            listener.join(5)
            self._done.put(WorkerFailed("".join(said)[-2000:].strip() or f"ended with {process.returncode}"))
        finally:
            self._done.put(None)


def start() -> Process:
    """A process that imports what it needs and waits for its first line."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "nanovllm.engine.precompile"]
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
