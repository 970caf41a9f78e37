"""The header of a GGUF file: metadata, and where each tensor is. Does not import torch.

A header is read without trust: every count, length and place is checked against the file's size
before anything of that size is made. Errors are `GgufError`, with the file's name.
"""

from __future__ import annotations

import functools
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.models.gguf.types import OTHERS, TYPES, GgufType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_HEADER = 1 << 26  # bytes; those of published models have up to 20 MB
FIRST_READ = 1 << 24
MOST_TENSORS, MOST_KEYS, MOST_SPLITS = 1 << 17, 1 << 16, 1 << 12
MOST_VALUES = 1 << 22  # of an array
LONGEST_NAME = 1 << 10  # bytes of a tensor's name
MOST_AXES = 4
LARGEST_ALIGNMENT = 1 << 20
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GgufError(ValueError):
    """A GGUF file is damaged, or has what is not supported."""


class GgufTensor(NamedTuple):
    """A tensor whose bytes begin at `begin` of a file. `shape` has the outermost axis first."""

    path: Path
    type: GgufType
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.type.columns * self.type.num_bytes


class Header(NamedTuple):
    """The metadata of a model's first file, and the tensors of all of its files. `digest` is that
    of all headers."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    paths: tuple[Path, ...]
    digest: str

    @property
    def architecture(self) -> str:
        found = self.get("general.architecture", str)
        if found is None:
            raise GgufError(f"{self.path}: general.architecture is missing")
        return str(found)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata, or the default. Raises GgufError for a value of another type."""
        value = self.metadata.get(key, default)
        is_number = isinstance(value, bool) and kind is not bool
        if value is not default and (not isinstance(value, kind) or is_number):
            raise GgufError(f"{self.path}: {key} is {value!r:.80}, which has another type")
        return value


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a GGUF file, by its end."""
    return os.fspath(path).lower().endswith(".gguf")


def split_paths(path: Path) -> list[Path]:
    """The files of a model that is split, by the name of one of them; else the file alone."""
    found = SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    stem, num = found[1], int(found[3])
    if not 0 < num <= MOST_SPLITS:
        raise GgufError(f"{path}: it names {num} files: a model has 1 to {MOST_SPLITS}")
    return [path.with_name(f"{stem}-{i:05d}-of-{num:05d}.gguf") for i in range(1, num + 1)]


def read(path: Path) -> Header:
    """The header of a model in one file, or in several ones of which `path` names one.

    Raises GgufError for a missing or damaged file, and for types that are not supported.
    """
    paths = split_paths(path)
    for one in paths:
        if not one.is_file():
            raise GgufError(f"{path}: {one.name} is missing: a split model needs all its files")
    stats = [one.stat() for one in paths]
    facts = tuple((one.st_size, one.st_mtime_ns, one.st_ino) for one in stats)
    return _read(tuple(paths), facts)


@functools.lru_cache(4)
def _read(paths: tuple[Path, ...], facts: tuple[tuple[int, ...], ...]) -> Header:
    tensors: dict[str, GgufTensor] = {}
    total, metadata = sha256(), None
    for i, (path, (size, *_)) in enumerate(zip(paths, facts, strict=True)):
        try:
            found, own, raw = _parsed(path, size)
        except OSError as error:
            raise GgufError(f"{path}: cannot be read: {error}") from error
        except UnicodeDecodeError as error:
            raise GgufError(f"{path}: a text of the header is not UTF-8: {error}") from error
        number, count = found.get("split.no", 0), found.get("split.count", len(paths))
        if (number, count) != (i, len(paths)) and len(paths) > 1:
            raise GgufError(f"{path}: it is file {number} of {count}, not {i} of {len(paths)}")
        if len(paths) == 1 and count > 1:
            raise GgufError(f"{path}: it is one of {count} files: keep their names -0000N-of-0000M")
        metadata = found if metadata is None else metadata
        if both := tensors.keys() & own.keys():
            raise GgufError(f"{path}: tensor {min(both)} is in two files")
        tensors |= own
        total.update(raw)
    assert metadata is not None
    header = Header(paths[0], metadata, tensors, paths, total.hexdigest())
    expected = header.get("split.tensors.count", int, len(tensors))
    if expected != len(tensors):
        raise GgufError(f"{paths[0]}: the files have {len(tensors)} tensors, not {expected}")
    return header


def _parsed(path: Path, size: int) -> tuple[dict[str, Any], dict[str, GgufTensor], bytes]:
    """A file's metadata, its tensors, and the bytes of its header."""
    limit = FIRST_READ
    with path.open("rb") as file:
        while True:
            file.seek(0)
            data = file.read(min(limit, size))
            try:
                cursor = _Cursor(path, data, size)
                metadata, tensors = _header(cursor)
                return metadata, tensors, data[: cursor.place]
            except _NeedsMore as error:
                if limit >= LARGEST_HEADER or len(data) < min(limit, size):
                    raise GgufError(
                        f"{path}: the header has more than {len(data)} bytes"
                    ) from error
                limit *= 4


class _NeedsMore(Exception):
    """The header goes on after the bytes that were read."""


class _Cursor:
    """Reads a header's numbers and texts one after another."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self.path, self.data, self.size, self.place = path, data, size, 0

    def error(self, what: str) -> GgufError:
        return GgufError(f"{self.path}: damaged or not a GGUF file: {what}")

    def take(self, num_bytes: int, what: str) -> int:
        """The place of the next bytes, which are skipped."""
        place = self.place
        if num_bytes > self.size - place:
            raise self.error(
                f"{what} has {num_bytes} bytes, but {self.size - place} are left in the file"
            )
        if num_bytes > len(self.data) - place:
            raise _NeedsMore
        self.place = place + num_bytes
        return place

    def number(self, code: str, what: str) -> Any:
        place = self.take(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, place)[0]

    def text(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        place = self.take(length, what)
        return self.data[place : place + length].decode()

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.text(key)
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], key)
        if kind != ARRAY:
            raise self.error(f"{key} has the unknown type {kind}")
        kind, count = self.number("I", key), self.number("Q", key)
        if count > MOST_VALUES:
            raise self.error(f"{key} has {count} values: at most {MOST_VALUES} are read")
        if kind in NUMBERS:
            code = NUMBERS[kind]
            place = self.take(count * struct.calcsize("<" + code), key)
            return struct.unpack_from(f"<{count}{code}", self.data, place)
        if kind != STRING:
            raise self.error(f"{key} is an array of the type {kind}: only numbers and texts are")
        return tuple(self.texts(count, key))

    def texts(self, count: int, key: str) -> Iterator[str]:
        """The texts of an array. Vocabularies have many: this is quicker than `text`."""
        data = self.data
        for _ in range(count):
            begin = self.place + 8
            stop = begin + int.from_bytes(data[self.place : begin], "little")
            if stop > len(data):
                yield self.text(key)  # refuses it
            else:
                self.place = stop
                yield data[begin:stop].decode()


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    place = cursor.take(4, "the beginning")
    if cursor.data[place : place + 4] != MAGIC:
        raise cursor.error("it does not begin with GGUF")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        big = version in (one << 24 for one in VERSIONS)
        what = "big-endian" if big else f"of version {version}"
        raise GgufError(f"{cursor.path}: it is {what}: only little-endian version 2 or 3 is read")
    num_tensors = _count(cursor, "tensors", MOST_TENSORS)
    num_keys = _count(cursor, "keys", MOST_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text("a key")
        if key in metadata:
            raise cursor.error(f"the key {key!r:.80} is there twice")
        metadata[key] = cursor.value(cursor.number("I", f"the type of {key!r:.80}"), key[:80])
    listed = [_tensor(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    is_valid = isinstance(alignment, int) and 0 < alignment <= LARGEST_ALIGNMENT
    if not is_valid or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r:.80}: it must be a power of 2")
    begin = -(-cursor.place // alignment) * alignment
    return metadata, _placed(cursor, listed, begin, alignment)


def _count(cursor: _Cursor, what: str, most: int) -> int:
    found = int(cursor.number("Q", f"the number of {what}"))
    if found > most:
        raise cursor.error(f"it has {found} {what}: at most {most} are read")
    return found


def _tensor(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """A tensor as it is listed; `begin` is counted from the first one."""
    name = cursor.text("a tensor's name")
    if len(name) > LONGEST_NAME:
        raise cursor.error(f"a tensor's name has {len(name)} letters: {name[:40]!r}…")
    num_axes = cursor.number("I", f"the axes of {name}")
    if not 0 < num_axes <= MOST_AXES:
        raise cursor.error(f"tensor {name} has {num_axes} axes: it must have 1 to {MOST_AXES}")
    shape = tuple(cursor.number("Q", f"the shape of {name}") for _ in range(num_axes))[::-1]
    number, begin = cursor.number("I", f"the type of {name}"), cursor.number("Q", name)
    one = TYPES.get(number)
    if one is None:
        known = ", ".join(found.name for found in TYPES.values())
        raise GgufError(
            f"{cursor.path}: tensor {name} has the type {OTHERS.get(number, number)}, which is not "
            f"supported: only {known} are"
        )
    if min(shape) < 1 or shape[-1] % one.columns:
        raise cursor.error(
            f"tensor {name} has shape {list(shape)}: rows must be multiples of {one.columns}, the "
            f"block of {one.name}"
        )
    return name, GgufTensor(cursor.path, one, shape, begin)


def _placed(
    cursor: _Cursor, listed: list[tuple[str, GgufTensor]], begin: int, alignment: int
) -> dict[str, GgufTensor]:
    """The tensors with their places in the file, which must be apart."""
    found: dict[str, GgufTensor] = {}
    end, before = begin, "the header"
    for name, tensor in sorted(listed, key=lambda one: one[1].begin):
        tensor = tensor._replace(begin=begin + tensor.begin)
        if tensor.begin % alignment:
            raise cursor.error(f"tensor {name} is not at a multiple of {alignment} bytes")
        if tensor.begin < end:
            raise cursor.error(f"tensor {name} overlaps with {before}")
        end, before = tensor.begin + tensor.num_bytes, f"tensor {name}"
        if end > cursor.size:
            raise cursor.error(
                f"tensor {name} of shape {list(tensor.shape)} ends at byte {end}, but the file has "
                f"{cursor.size}"
            )
        if name in found:
            raise cursor.error(f"tensor {name} is there twice")
        found[name] = tensor
    return found
