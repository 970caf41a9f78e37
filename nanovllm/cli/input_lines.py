"""User input: editable lines, pasted text as one message, a history."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from nanovllm import env
from nanovllm.kernels.private_files import UnsafePath, make_private

logger = logging.getLogger(__name__)
QUOTES = '"""'
MOST_LINES = 1000  # in the history


class Input:
    """Messages from stdin. A message of several lines is enclosed in triple quotes, or pasted into
    a terminal. With `has_history` a terminal's lines are saved for later sessions."""

    def __init__(self, *, has_history: bool) -> None:
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._history: History | None = None
        if self._is_terminal:
            import readline  # input() then edits lines

            # Python turns this off; libedit ignores it
            readline.parse_and_bind("set enable-bracketed-paste on")
            if has_history and (folder := env.state_folder()) is not None:
                self._history = History(readline, folder)

    def read(self) -> str:
        """The next message, stripped. Raises EOFError and KeyboardInterrupt."""
        line = self._line("> ").strip()
        if not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(self._line("... "))
            except EOFError:
                break
        return "\n".join(lines).rstrip().removesuffix(QUOTES).strip()

    def close(self) -> None:
        if self._history is not None:
            self._history.save()

    def _line(self, prompt: str) -> str:
        return input(prompt if self._is_terminal else "")


class History:
    """The lines of earlier sessions, in a file that only its owner can read; no history where that
    is impossible."""

    def __init__(self, readline: Any, folder: Path) -> None:
        self._readline = readline
        self._path: Path | None = folder / "history"
        try:
            make_private(folder)
            self._protect()
            readline.read_history_file(self._path)
        except (OSError, UnsafePath) as error:
            self._give_up(error)
        self._num_before = readline.get_current_history_length()

    def save(self) -> None:
        """Append this session's lines to the file."""
        readline = self._readline
        num_new = readline.get_current_history_length() - self._num_before
        if self._path is None or num_new <= 0:
            return
        readline.set_history_length(MOST_LINES)
        try:
            if hasattr(readline, "append_history_file"):
                readline.append_history_file(num_new, self._path)
            else:  # libedit
                readline.write_history_file(self._path)
            self._protect()
        except OSError as error:
            self._give_up(error)

    def _protect(self) -> None:
        """Create the file if it is missing, and make it private. Follows no links."""
        assert self._path is not None
        number = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(number, 0o600)
        finally:
            os.close(number)

    def _give_up(self, error: Exception) -> None:
        logger.debug("input history is not saved: %s", error)
        self._path = None
