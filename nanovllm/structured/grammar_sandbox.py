"""The engine's side of the grammar sandbox processes (`trial.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from nanovllm import programs
from nanovllm.confined import Confined
from nanovllm.structured.library import Source

_START_S = 30.0  # to import the library


class TooSlow(ValueError):
    """Compiling a grammar exceeds the time limit."""


class GrammarSandbox:
    """A process that tries one grammar at a time."""

    def __init__(self, special: Callable[[], Mapping[int, str]]) -> None:
        """special: returns the model's special tokens."""
        self._special = special
        self._program = Confined(
            lambda: programs.start_confined("nanovllm.structured.grammar_sandbox_program")
        )
        self._is_closed = False

    def run(self, found: Source, timeout_s: float) -> str:
        """The library's grammar of a source. Raises ValueError with the cause if it is invalid, and
        TooSlow."""
        if self._is_closed:
            raise ValueError("the engine is closed")
        is_new = self._program.start()
        if is_new:
            self._program.send(self._special())
        request = {**found._asdict(), "timeout_s": timeout_s}
        try:
            answer = self._ask(request, timeout_s + (_START_S if is_new else 1.0))
        except BaseException:
            self._program.end()
            raise
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["grammar"])

    def kill(self) -> None:
        """End the process for ever. Another thread may be in `run`, which raises then."""
        self._is_closed = True
        self._program.kill()

    def close(self) -> None:
        """End the process permanently, when no thread is in `run`."""
        self._is_closed = True
        self._program.end()

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        start = time.monotonic()
        self._program.send(request)
        answer = self._program.receive(start + timeout_s)
        if answer is not None:
            return dict(answer)
        took_s = time.monotonic() - start
        if took_s >= request["timeout_s"]:
            raise TooSlow(
                f"it takes longer than {request['timeout_s']:g} s to compile "
                "(option grammar_timeout_s)"
            )
        raise ValueError("it crashed the compiler: it is nested too deeply or too large")
