"""The input of a batch job: a file with one JSON object per line.

An invalid line raises `Refused` and does not fail the job.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

MAX_LINE_BYTES = 64 << 20
BLOCK_BYTES = 1 << 20
KEYS = ("prompt", "messages", "id", "params", "model")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """A line that is not blank.

    row: its index in the file, from 0, counting blank lines. num_bytes: its length with the
    newline. text: None if it is longer than MAX_LINE_BYTES.
    """

    row: int
    text: bytes | None
    num_bytes: int


@dataclass(frozen=True)
class Row:
    """A valid row: a prompt (text or token ids) or the messages of one conversation. model: the
    name of an adapter, None for the model itself."""

    id: Any
    prompt: str | list[Any] | None
    messages: list[Mapping[str, Any]] | None
    params: Mapping[str, Any]
    model: str | None = None


class Refused(ValueError):
    """A row that cannot be answered. `id`: the row's id, None if it is unknown."""

    def __init__(self, reason: str, row_id: Any = None) -> None:
        super().__init__(reason)
        self.id = row_id


@dataclass(frozen=True)
class Scan:
    """The result of reading the whole input once. sha256: of all bytes. num_rows: lines that are
    not blank. num_before: those up to and including the requested row. next_offset: the byte offset
    of the line after it."""

    sha256: str
    num_bytes: int
    num_rows: int
    num_before: int
    next_offset: int


class Readable(Protocol):
    """The part of a file that `read_lines` uses."""

    def readline(self, limit: int, /) -> bytes: ...


def read_lines(file: Readable, row: int = 0) -> Iterator[Line]:
    """The lines from the file's position, which is the start of line `row`.

    Blank lines are skipped. At most MAX_LINE_BYTES of a line are in memory.
    """
    while text := file.readline(MAX_LINE_BYTES + 1):
        num_bytes, whole = len(text), True
        while not text.endswith(b"\n") and num_bytes > MAX_LINE_BYTES:
            whole = False
            text = file.readline(BLOCK_BYTES)
            num_bytes += len(text)
            if not text:
                break
        if row == 0 and whole:
            text = text.removeprefix(BOM)
        if not whole:
            yield Line(row, None, num_bytes)
        elif not text.isspace() and text:
            yield Line(row, text, num_bytes)
        row += 1


def scan(path: Path, last_row: int = -1) -> Scan:
    """Read the whole file once. `last_row`: the row after which to report the offset; -1: none.

    Raises OSError.
    """
    digest, position, num_rows, num_before, next_offset = hashlib.sha256(), 0, 0, 0, 0
    with open(path, "rb") as file:
        hashed = _Hashed(file, digest)
        for line in read_lines(hashed):
            num_rows += 1
            if line.row <= last_row:
                num_before += 1
                next_offset = hashed.position
        position = hashed.position
    return Scan(digest.hexdigest(), position, num_rows, num_before, next_offset)


class _Hashed:
    """A file that hashes its lines as they are read. position: bytes read so far."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest, self.position = file, digest, 0

    def readline(self, limit: int) -> bytes:
        text = self._file.readline(limit)
        self._digest.update(text)
        self.position += len(text)
        return text


def parse(line: Line) -> Row:
    """The row in a line. Raises Refused for an invalid one."""
    if line.text is None:
        raise Refused(f"the line has {line.num_bytes} bytes: at most {MAX_LINE_BYTES} are allowed")
    numbers = _Numbers()
    try:
        found = json.loads(
            line.text.decode("utf-8"), parse_float=numbers.read, parse_constant=numbers.read
        )
    except RecursionError:
        raise Refused("the line is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise Refused(f"the line is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused(f"the line is {_shown(found)}: it must be a JSON object")
    row_id = found.get("id")
    if not numbers.are_finite and (path := _not_finite(found)):
        is_own = re.match(r"id\b", path)
        raise Refused(f"{path[:200]} is not a finite number", None if is_own else row_id)
    unknown = [key for key in found if key not in KEYS]
    if "custom_id" in unknown:
        words = "the row is in OpenAI's batch format: put its body's messages or prompt into the "
        raise Refused(
            f"{words}row, other fields into params, custom_id into id", found["custom_id"]
        )
    if unknown:
        raise Refused(f"the row has the key {unknown[0]!r}: use {', '.join(KEYS)}", row_id)
    try:
        return _checked(row_id, found)
    except Refused as error:
        raise Refused(str(error), row_id) from None


def _checked(row_id: Any, found: Mapping[str, Any]) -> Row:
    given = [key for key in ("prompt", "messages") if found.get(key) is not None]
    if len(given) != 1:
        raise Refused(f"the row has {' and '.join(given) or 'no prompt'}: use prompt or messages")
    keys = ("prompt", "messages", "params", "model")
    prompt, messages, params, model = map(found.get, keys)
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise Refused(f"prompt is {_shown(prompt)}: it must be text or a list of token ids")
    if messages is not None:
        are_messages = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        if not are_messages or not messages:
            raise Refused(f"messages is {_shown(messages)}: it must be a list of messages")
    if params is not None and not isinstance(params, dict):
        raise Refused(f"params is {_shown(params)}: it must be an object of sampling parameters")
    if model is not None and not isinstance(model, str):
        raise Refused(f"model is {_shown(model)}: it must be the name of an adapter")
    return Row(row_id, prompt, messages, params or {}, model)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


class _Numbers:
    """Parses numbers, and records whether one is NaN or infinite, such as 1e999."""

    def __init__(self) -> None:
        self.are_finite = True

    def read(self, text: str) -> float:
        value = float(text)
        self.are_finite = self.are_finite and math.isfinite(value)
        return value


def _not_finite(value: Any) -> str:
    """The path of a NaN or infinite number, such as `params.temperature` or `id[2]`; "" if there is
    none."""
    left = [("", value)]  # no recursion: the input may be nested deeply
    while left:
        path, one = left.pop()
        if isinstance(one, float) and not math.isfinite(one):
            return path
        inner: list[tuple[str, Any]] = []
        if isinstance(one, dict):
            inner = [(f"{path}.{key}" if path else key, item) for key, item in one.items()]
        elif isinstance(one, list):
            inner = [(f"{path}[{i}]", item) for i, item in enumerate(one)]
        left += reversed(inner)
    return ""
