"""The output of a batch job, and how a stopped job resumes.

Rows are written in input order, so the last complete line shows where to resume. The file OUT.job
beside the output identifies its job.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nanovllm.batch.results import Result
from nanovllm.batch.rows import Line

VERSION = 1
BLOCK_BYTES = 1 << 20
# One long answer delays the rows after it. This many of them may finish in the meantime: bytes are
# those of their input and output.
MAX_WAITING, MAX_WAITING_BYTES = 8192, 256 << 20


@dataclass(frozen=True)
class Found:
    """The contents of an output. num_rows: complete lines. last_row: the row of the last one, -1 if
    there is none. num_bytes: their length; an incomplete line after them is cut off."""

    num_rows: int
    last_row: int
    num_bytes: int


class Output:
    """The output file, locked by one job at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises OSError, and ValueError if another job is using it."""
        self.path, self.sidecar = path, Path(f"{path}.job")
        self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another job is writing to {path}") from None

    def close(self) -> None:
        """Sync the file to disk and unlock it."""
        os.fsync(self._file.fileno())
        self._file.close()

    def find(self) -> Found:
        """Read the existing output. Raises ValueError if it is not that of a batch job."""
        self._file.seek(0)
        num_rows, position, num_bytes, tail, last = 0, 0, 0, b"", b""
        while block := self._file.read(BLOCK_BYTES):
            tail += block
            position += len(block)
            whole, end, rest = tail.rpartition(b"\n")
            if end:
                num_rows += whole.count(b"\n") + 1
                last, tail = whole.rpartition(b"\n")[2], rest
                num_bytes = position - len(rest)
        return Found(num_rows, self._row_of(last) if num_rows else -1, num_bytes)

    def _row_of(self, line: bytes) -> int:
        try:
            row = json.loads(line)["row"]
        except (ValueError, KeyError, TypeError):
            row = None
        if type(row) is not int or row < 0:
            raise ValueError(
                f"{self.path} is not the output of a batch job: its last line has no 'row'; "
                "--overwrite replaces it"
            )
        return row

    def check(self, job: Mapping[str, Any]) -> None:
        """Raise ValueError if the existing output belongs to another job."""
        try:
            before = json.loads(self.sidecar.read_text(encoding="utf-8"))
        except FileNotFoundError:
            before = None
        except ValueError:
            raise ValueError(f"{self.sidecar} is damaged; --overwrite starts over") from None
        if not isinstance(before, dict):
            raise ValueError(f"{self.path} exists, but {self.sidecar} does not; use --overwrite")
        now = _as_stored(job)
        for name in (*now, *before):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{self.path} was written with a different {name}: {_shown(before.get(name))}, "
                    f"not {_shown(now.get(name))}; --overwrite starts over"
                )

    def start(self, job: Mapping[str, Any]) -> None:
        """Empty the output, and store the facts of its job."""
        self._file.truncate(0)
        os.fsync(self._file.fileno())
        temporary = Path(f"{self.sidecar}.{os.getpid()}")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(_as_stored(job), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.sidecar)

    def cut(self, num_bytes: int) -> None:
        """Keep only the first `num_bytes`."""
        self._file.truncate(num_bytes)

    def append(self, lines: Iterable[bytes]) -> None:
        """Append complete lines. Once this returns, killing the process loses none of them."""
        left = memoryview(b"".join(lines))
        while left:
            left = left[self._file.write(left) :]


class InOrder:
    """Reorders results into input order. It holds a limited number of rows: those being processed,
    and those that finished before their turn."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int]] = deque()  # (row, bytes of its line), in order
        self._num_bytes = 0
        self._done: dict[int, Result] = {}

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    def has_room(self) -> bool:
        return len(self._waiting) < MAX_WAITING and self._num_bytes < MAX_WAITING_BYTES

    def expect(self, line: Line) -> None:
        self._waiting.append((line.row, line.num_bytes))
        self._num_bytes += line.num_bytes

    def put(self, results: Iterable[Result]) -> list[Result]:
        """Add results in any order; returns those whose turn it is. Each row has one result."""
        for result in results:
            assert result.row not in self._done, f"row {result.row} was answered twice"
            self._done[result.row] = result
            self._num_bytes += len(result.line)
        ready = []
        while self._waiting and self._waiting[0][0] in self._done:
            row, num_bytes = self._waiting.popleft()
            ready.append(self._done.pop(row))
            self._num_bytes -= num_bytes + len(ready[-1].line)
        return ready


def _as_stored(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job after a round trip through JSON."""
    return json.loads(json.dumps({"version": VERSION, **job}, default=str))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
