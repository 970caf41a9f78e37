"""Incremental reading of a text that arrives in pieces.

Readers are generators: a bare `yield` waits for more text or its end. Their results do not depend
on where the text is split.

Each character is examined a bounded number of times: only a prefix of a marker, which is shorter
than the marker, can stay unread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

from nanovllm.parsers.parts import Part, Sink

T = TypeVar("T")
Wait: TypeAlias = Generator[None, None, T]
Emit: TypeAlias = Callable[[str], None]

SPACES = re.compile(r"\s+")


def ignore(text: str) -> None:
    """An `Emit` that drops the text."""


class AnswerReader:
    def __init__(self) -> None:
        self.ended = False
        self._text, self._at = "", 0
        self._kept: list[str] | None = None

    def feed(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    def keep(self, prefix: str = "") -> None:
        """Keep all text read from now on, after `prefix`."""
        self._kept = [prefix]

    def kept(self) -> str:
        """Return the kept text, and stop keeping."""
        kept, self._kept = self._kept or [], None
        return "".join(kept)

    def peek(self) -> Wait[str]:
        """The next character; "" at the end."""
        while self._at == len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def next(self) -> Wait[str]:
        """Read one character; "" at the end."""
        char = yield from self.peek()
        return self._read(len(char))

    def run(self, characters: re.Pattern[str], emit: Emit) -> Wait[bool]:
        """Read while characters match `characters`, one class with "+". True if any did."""
        some = False
        while True:
            match = characters.match(self._text, self._at)
            if match is not None:
                some = True
                emit(self._read(match.end() - self._at))
            if self._at < len(self._text) or self.ended:
                return some
            yield

    def spaces(self) -> Wait[None]:
        yield from self.run(SPACES, ignore)

    def accept(self, marker: str) -> Wait[bool]:
        """Read the marker if it comes next. Returns whether it did."""
        while True:
            have = self._text[self._at : self._at + len(marker)]
            if have == marker:
                self._read(len(marker))
                return True
            if self.ended or not marker.startswith(have):
                return False
            yield

    def until(self, markers: Sequence[str], emit: Emit) -> Wait[str]:
        """Read up to and including the first of the markers; returns it, or "" at the end.

        No marker may contain another one.
        """
        pattern = re.compile("|".join(map(re.escape, markers)))  # re caches it
        while True:
            match = pattern.search(self._text, self._at)
            if match is not None:
                emit(self._read(match.start() - self._at))
                return self._read(len(match.group()))
            held = 0 if self.ended else self._num_held(markers)
            emit(self._read(len(self._text) - held - self._at))
            if self.ended:
                return ""
            yield

    def rest(self, emit: Emit) -> Wait[None]:
        """Read to the end."""
        while True:
            emit(self._read(len(self._text) - self._at))
            if self.ended:
                return
            yield

    def _num_held(self, markers: Sequence[str]) -> int:
        """The length of the longest end of the text that is a prefix of a marker."""
        longest = min(max(map(len, markers)) - 1, len(self._text) - self._at)
        tail = self._text[len(self._text) - longest :]
        if not any(marker[0] in tail for marker in markers):
            return 0
        for num in range(longest, 0, -1):
            end = tail[longest - num :]
            if any(marker.startswith(end) for marker in markers):
                return num
        return 0

    def _read(self, num: int) -> str:
        text = self._text[self._at : self._at + num]
        self._at += num
        if self._kept is not None:
            self._kept.append(text)
        return text


class TextParser:
    """Runs a format's generator on a text that arrives in pieces."""

    def __init__(self, work: Callable[[AnswerReader, Sink], Wait[None]]) -> None:
        self._reader, self._sink = AnswerReader(), Sink()
        self._work = work(self._reader, self._sink)
        next(self._work, None)

    def push(self, text: str) -> list[Part]:
        """Parse more text. Returns the new parts."""
        if self._reader.ended:
            raise RuntimeError("the text has ended")
        self._reader.feed(text)
        next(self._work, None)
        return self._sink.take()

    def finish(self) -> list[Part]:
        """End the text. Returns the remaining parts; [] if called again."""
        self._reader.ended = True
        next(self._work, None)
        self._sink.end()
        return self._sink.take()
