"""Both sides of a process that handles what strangers have sent, one request at a time: a picture,
a chat template, a grammar.

Requests and answers are lines of JSON. Such a process may crash, run for ever or take all memory:
it then ends alone, and starts again with the next request.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

LOOK_S = 0.1  # how often a thread that waits looks whether its work is cancelled
_PIECE_BYTES = 1 << 16  # what a pipe holds


class Confined:
    """The parent's side. One thread at a time may use it, but for `kill`.

    process: None before the first start and after `end`.
    """

    def __init__(
        self, start: Callable[[], subprocess.Popen[bytes]], max_answer_bytes: int = 1 << 30
    ) -> None:
        """start: calls `programs.start_confined`. A longer answer ends the process."""
        self._start, self._max_bytes = start, max_answer_bytes
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        process = self.process
        return process is not None and process.poll() is None

    def start(self) -> bool:
        """Start the process unless it runs; returns whether it was started. Raises OSError."""
        if self.is_running:
            return False
        self.end()
        self.process = self._start()
        return True

    def kill(self) -> None:
        """End the process. Another thread that waits for an answer gets none."""
        if (process := self.process) is not None:
            process.kill()

    def end(self) -> int:
        """End the process and wait for that; returns its exit status, 0 without a process."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.kill()
        with contextlib.suppress(OSError):
            process.communicate()
        return process.returncode or 0

    def send(self, message: Any) -> None:
        """Send a request: bytes of one line, or what becomes JSON. If the process has ended, there
        will be no answer."""
        assert self.process is not None and self.process.stdin is not None
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        left = memoryview(data + b"\n")
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[os.write(self.process.stdin.fileno(), left) :]

    def receive(
        self, deadline: float = math.inf, check: Callable[[], None] | None = None
    ) -> Any | None:
        """The next answer; None if the process ends, or is late by `time.monotonic`. `check` is
        called now and then, and may raise."""
        assert self.process is not None and self.process.stdout is not None
        fd = self.process.stdout.fileno()
        found = bytearray()
        while not found.endswith(b"\n"):
            if (check is not None or deadline < math.inf) and not _wait(fd, deadline, check):
                return None
            piece = os.read(fd, _PIECE_BYTES)
            if not piece:
                return None
            found += piece
            if len(found) > self._max_bytes:
                self.kill()
                return None
        return json.loads(found.decode("utf-8", "surrogatepass"))


def _wait(fd: int, deadline: float, check: Callable[[], None] | None) -> bool:
    """Wait until a pipe can be read; False at the deadline."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    most_s = math.inf if check is None else LOOK_S
    while True:
        if check is not None:
            check()
        left_s = min(most_s, deadline - time.monotonic())
        if left_s <= 0:
            return False
        if poll.poll(left_s * 1000):
            return True


@functools.cache
def _answers() -> BinaryIO:
    return os.fdopen(int(sys.argv[-1]), "wb")


def request() -> Any | None:
    """In the process: the next request; None after the last one."""
    line = sys.stdin.buffer.readline()
    return json.loads(line.decode("utf-8", "surrogatepass")) if line else None


def answer(message: Any) -> None:
    """In the process: send an answer."""
    text = json.dumps(message, ensure_ascii=False)
    _answers().write(text.encode("utf-8", "surrogatepass") + b"\n")
    _answers().flush()
