"""A batch job, from its files to the summary."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm import progress
from nanovllm.batch.output import InOrder, Output
from nanovllm.batch.results import Result
from nanovllm.batch.rows import Line, Scan, read_lines, scan
from nanovllm.batch.worker import EngineWorker

MakeWorker = Callable[[], EngineWorker]


@dataclass
class Summary:
    """Counts of a run. num_before: rows written by earlier runs."""

    num_rows: int
    num_before: int
    num_written: int = 0
    num_errors: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def num_left(self) -> int:
        return self.num_rows - self.num_before - self.num_written

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        earlier = f" after {self.num_before:,} from earlier runs" if self.num_before else ""
        return (
            f"{self.num_written:,} of {self.num_rows:,} rows written{earlier}, {self.num_left:,} "
            f"left; {self.num_errors:,} errors; {self.num_tokens:,} tokens in "
            f"{self.seconds:.1f} s ({self.num_written / seconds:.1f} rows/s, "
            f"{self.num_tokens / seconds:.0f} tok/s)"
        )


class Job:
    """A job on two files. `facts` identify, with the input, the job that an output belongs to."""

    def __init__(
        self, source: Path, target: Path, facts: Mapping[str, Any], *, overwrite: bool
    ) -> None:
        """Determine what is left to do. The output file then exists and is locked for this job.

        Raises OSError, and ValueError if the output belongs to another job and `overwrite` is
        False.
        """
        if not source.is_file():
            raise ValueError(f"{source} is not a file")
        if target.exists() and target.samefile(source):
            raise ValueError(f"{target} is the input: use another file with -o")
        self._source = source
        self._output = Output(target)
        try:
            self._begin(facts, overwrite)
        except BaseException:
            self._output.close()
            raise

    def _begin(self, facts: Mapping[str, Any], overwrite: bool) -> None:
        found = None if overwrite else self._output.find()
        self._state = self._source_state()
        self._scan: Scan = scan(self._source, found.last_row if found else -1)
        about = {"sha256": self._scan.sha256, "bytes": self._scan.num_bytes}
        facts = {"input": about, **facts}
        self._next_row = 0
        if found and found.num_rows:
            self._output.check(facts)
            if found.num_rows != self._scan.num_before:
                raise ValueError(
                    f"{self._output.path} has {found.num_rows} rows up to row {found.last_row}, "
                    f"but the input has {self._scan.num_before}; --overwrite starts over"
                )
            self._output.cut(found.num_bytes)
            self._next_row = found.last_row + 1
        else:
            self._output.start(facts)
        self.summary = Summary(self._scan.num_rows, self._scan.num_before)

    def close(self) -> None:
        self._output.close()

    def run(self, make_worker: MakeWorker, *, show_progress: bool = True) -> None:
        """Answer all remaining rows. `summary` is valid even if this raises.

        Raises the errors of `make_worker` and the worker, and ValueError if the input changes.
        """
        summary = self.summary
        if not summary.num_left:
            return
        worker = make_worker()
        started = time.perf_counter()
        counts: dict[str, Any] = {"total": summary.num_rows, "initial": summary.num_before}
        bar = progress.bar(unit="row", desc="rows", disable=not show_progress, **counts)
        try:
            with bar, open(self._source, "rb") as file:
                file.seek(self._scan.next_offset)
                for results in _answers(read_lines(file, self._next_row), worker):
                    self._output.append(result.line for result in results)
                    self._count(results)
                    summary.seconds = time.perf_counter() - started
                    bar.update(len(results))
                    speed = summary.num_tokens / summary.seconds
                    bar.set_postfix_str(f"{speed:.0f} tok/s, {summary.num_errors} errors")
            if self._source_state() != self._state:
                raise ValueError(f"{self._source} has changed during the job")
            assert not summary.num_left, f"{summary.num_left} rows have no result"
        finally:
            worker.close()

    def _count(self, results: list[Result]) -> None:
        self.summary.num_written += len(results)
        self.summary.num_errors += sum(result.is_error for result in results)
        self.summary.num_tokens += sum(result.num_tokens for result in results)

    def _source_state(self) -> tuple[int, int]:
        state = os.stat(self._source)
        return state.st_size, state.st_mtime_ns


def _answers(lines: Iterator[Line], worker: EngineWorker) -> Iterator[list[Result]]:
    """The results of all lines in the order of the lines, some at a time."""
    order, more = InOrder(), True
    while True:
        while more and worker.has_room() and order.has_room():
            line = next(lines, None)
            if line is None:
                more = False
                break
            order.expect(line)
            worker.submit(line)
        if order.is_empty and not more:
            return
        ready = order.put(worker.wait())
        if ready:
            yield ready
