"""The engine's side of the grammar sandbox processes (`trial.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from nanovllm import programs
from nanovllm.structured.library import Source

_START_S = 30.0  # to import the library
_PIECE_BYTES = 1 << 16


class TooSlow(ValueError):
    """Compiling a grammar exceeds the time limit."""


class Trial:
    """A process that compiles one grammar at a time. It starts when first needed, and again after a
    grammar has crashed it."""

    def __init__(self, special: Callable[[], Mapping[int, str]]) -> None:
        """special: returns the model's special tokens."""
        self._special = special
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def run(self, found: Source, timeout_s: float) -> str:
        """The library's grammar for a source. Raises TooSlow; ValueError for an invalid source."""
        is_new = self._process is None or self._process.poll() is not None
        if is_new:
            self._start()
            self._write(self._special())
        request = {**found._asdict(), "timeout_s": timeout_s}
        try:
            answer = self._ask(request, timeout_s + (_START_S if is_new else 1.0))
        except BaseException:
            self._end()
            raise
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["grammar"])

    def kill(self) -> None:
        """End the process permanently. A thread in `run` then raises."""
        self._is_closed, process = True, self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process permanently, when no thread is in `run`."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self._end()
        if self._is_closed:
            raise ValueError("the engine is closed")
        self._process = programs.start_confined("nanovllm.structured.trial")

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        start = time.monotonic()
        self._write(request)
        line = self._line(start + timeout_s)
        if line:
            return dict(json.loads(line))
        took_s = time.monotonic() - start
        if took_s >= request["timeout_s"]:
            raise TooSlow(
                f"it takes longer than {request['timeout_s']:g} s to compile "
                "(option grammar_timeout_s)"
            )
        raise ValueError("it crashed the compiler: it is nested too deeply or too large")

    def _write(self, message: Mapping[Any, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then no reply will come
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _line(self, deadline: float) -> bytes:
        """The next line; b"" if the process ends or the deadline passes."""
        assert self._process is not None and self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        found = b""
        while not found.endswith(b"\n"):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000):
                return b""
            piece = os.read(fd, _PIECE_BYTES)
            if not piece:
                return b""
            found += piece
        return found
