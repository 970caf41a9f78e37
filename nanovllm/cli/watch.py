"""Progress of a long command: a bar in a terminal, else a line on stderr every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from nanovllm import env, progress
from nanovllm.flags import Parser

BAR_SECONDS, LINE_SECONDS = 0.5, 10.0


def add_quiet(parser: Parser) -> None:
    """Add --quiet, which `cli.main.run` handles."""
    text = "no progress, and only warnings in the log"
    parser.add_argument("--quiet", action="store_true", help=text)


class Watch:
    """Shows a count that grows up to `total`; nothing with --quiet or without `shown`.

    A thread reads the count at most a few times per second, so counting stays fast. `count` returns
    the count; the default is the sum of `update`.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        total: int | None = None,
        *,
        count: Callable[[], int] | None = None,
        shown: bool = True,
    ) -> None:
        self.name, self.unit, self.total, self.note = name, unit, total, ""
        self._num = 0
        self._count = count or (lambda: self._num)
        self._is_shown = shown and not env.hides_bars()
        self._has_bar = self._is_shown and progress.is_drawn()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._begun = time.monotonic()

    def update(self, num: int = 1) -> None:
        self._num += num

    def __enter__(self) -> Watch:
        if self._is_shown:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._is_shown:
            self._thread.join()

    def _follow(self) -> None:
        if not self._has_bar:
            while not self._ended.wait(LINE_SECONDS):
                print(self._line(), file=sys.stderr, flush=True)
            return
        with progress.bar(desc=self.name, unit=f" {self.unit}", total=self.total) as bar:
            has_ended = False
            while not has_ended:
                has_ended = self._ended.wait(BAR_SECONDS)
                bar.n, bar.total = self._count(), self.total
                bar.set_postfix_str(self.note)

    def _line(self) -> str:
        num, seconds = self._count(), time.monotonic() - self._begun
        share = f" of {self.total:,} {self.unit} ({num / self.total:.0%})" if self.total else ""
        line = f"{self.name}: {num:,}{share or f' {self.unit}'} in {seconds:.0f} s"
        return f"{line}, {self.note}" if self.note else line
