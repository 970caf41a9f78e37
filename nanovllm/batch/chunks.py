"""Chunks of lines for replicas, and retries after a lost replica.

It is unknown which row, if any, killed a replica. So the chunks of a lost replica become suspects.
A suspect runs alone on an idle replica. If that is lost, too, the suspect is halved; a single row
that has cost ALONE_LOSSES replicas in this way becomes an error.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nanovllm.batch import results
from nanovllm.batch.results import Result
from nanovllm.batch.rows import Line, Refused, parse

CHUNK_ROWS, CHUNK_BYTES = 64, 8 << 20
ALONE_LOSSES = 2


@dataclass
class Chunk:
    """num_alone: the number of replicas lost while they ran only this chunk."""

    lines: list[Line]
    is_suspect: bool = False
    num_alone: int = 0


class Chunks:
    """The chunks that wait for a replica."""

    def __init__(self, num_rows: int, num_replicas: int) -> None:
        """`num_rows` are left; small jobs get small chunks, so that each replica gets several."""
        self._rows = max(1, min(CHUNK_ROWS, num_rows // (4 * num_replicas)))
        self._max_waiting = num_replicas
        self._open: list[Line] = []
        self._open_bytes = 0
        self._waiting: deque[Chunk] = deque()
        self._suspects: deque[Chunk] = deque()

    def has_room(self) -> bool:
        return len(self._waiting) + len(self._suspects) < self._max_waiting

    def add(self, line: Line) -> None:
        self._open.append(line)
        self._open_bytes += line.num_bytes
        if len(self._open) >= self._rows or self._open_bytes >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Close the chunk being filled."""
        if self._open:
            self._waiting.append(Chunk(self._open))
            self._open, self._open_bytes = [], 0

    def next_for(self, is_idle: bool) -> Chunk | None:
        """The next chunk for a replica that has no suspect; `is_idle`: it has no chunk at all.

        While suspects wait, no other chunk is handed out, so that replicas become idle.
        """
        if self._suspects:
            return self._suspects.popleft() if is_idle else None
        return self._waiting.popleft() if self._waiting else None

    def lost(self, chunk: Chunk) -> list[Result]:
        """Take back a chunk of a lost replica. Returns an error result for an abandoned row."""
        if not chunk.is_suspect:
            chunk.is_suspect = True
            self._suspects.append(chunk)
            return []
        chunk.num_alone += 1
        if len(chunk.lines) > 1:
            middle = len(chunk.lines) // 2
            halves = chunk.lines[:middle], chunk.lines[middle:]
            self._suspects += [Chunk(half, is_suspect=True) for half in halves]
            return []
        if chunk.num_alone < ALONE_LOSSES:
            self._suspects.append(chunk)
            return []
        (line,) = chunk.lines
        reason = f"{chunk.num_alone} replicas were lost while running this row alone"
        return [results.failure(line.row, _id(line), reason)]


def _id(line: Line) -> object:
    try:
        return parse(line).id
    except Refused as error:
        return error.id
