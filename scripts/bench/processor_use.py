"""How much processor time each process takes during a measurement, on Linux."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

SAMPLE_SECONDS = 1.0
# what tells a process's kind, by words of its command
KINDS = {
    "nanovllm.replicas.engine_program": "engine", "nanovllm.serving.api_process": "api",
    "nanovllm.cli.bench.client": "client",
}  # fmt: skip


class Used(NamedTuple):
    """Seconds of processor time of all threads, and of the main thread, so far."""

    kind: str
    parent: int
    total: float
    main: float


class ProcessorUse:
    """Samples this process's descendants of a known kind."""

    def __init__(self) -> None:
        self._first: dict[int, Used] = {}
        self._last: dict[int, Used] = {}
        self._busiest: dict[int, float] = {}  # the greatest share of a main thread in a sample
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def end(self) -> list[dict[str, Any]]:
        """Stop sampling. Of each process: seconds of all threads and of the main one, and the
        greatest share of a core that the main one had for a second."""
        self._ended.set()
        self._thread.join()
        found = []
        for pid, last in sorted(self._last.items()):
            first = self._first[pid]
            found.append(
                {
                    "process": last.kind,
                    "seconds": round(last.total - first.total, 2),
                    "main_thread_seconds": round(last.main - first.main, 2),
                    "busiest": round(self._busiest.get(pid, 0.0), 2),
                }
            )
        return found

    def _sample(self) -> None:
        before, has_ended = time.monotonic(), False
        while True:
            now, seconds = descendants(os.getpid()), time.monotonic() - before
            before += seconds
            for pid, used in now.items():
                if pid in self._last and not has_ended:  # the last sample may be short
                    share = (used.main - self._last[pid].main) / max(seconds, 1e-3)
                    self._busiest[pid] = max(share, self._busiest.get(pid, 0.0))
                self._first.setdefault(pid, used)
                self._last[pid] = used
            if has_ended:
                return
            has_ended = self._ended.wait(SAMPLE_SECONDS)


@contextmanager
def watched(found: list[dict[str, Any]]) -> Iterator[None]:
    """Fill a list with the use of the processes that run in the block."""
    use = ProcessorUse()
    try:
        yield
    finally:
        found += use.end()


def descendants(pid: int) -> dict[int, Used]:
    """This process's descendants of a known kind; none where there is no /proc."""
    every: dict[int, Used] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):  # ended meanwhile: no files, or empty ones
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            kind = next((kind for word, kind in KINDS.items() if word in command), "")
            parent, total = _times(folder / "stat")
            main = _times(folder / "task" / folder.name / "stat")[1] if kind else 0.0
            every[int(folder.name)] = Used(kind, parent, total, main)
    own = [pid]
    for one in own:  # grows in the loop
        own += [child for child, used in every.items() if used.parent == one]
    return {one: every[one] for one in own if one in every and every[one].kind}


def _times(stat: Path) -> tuple[int, float]:
    """The parent, and the seconds in user and system mode."""
    words = stat.read_text().rpartition(")")[2].split()
    return int(words[1]), (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
