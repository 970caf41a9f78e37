"""The tensors of a checkpoint's safetensors files: finds and reads them.

safetensors checks each file when it is opened. The tensors' bytes are then read without it, by
several threads: a thread that maps a file waits at every page, and a file that shrinks meanwhile
would end the process.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Dtypes of packed numbers, whose scales are separate tensors: only formats read them (`packed`).
PACKED_DTYPES = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
FLOATING_POINT = "a floating point dtype"
READERS = 8  # threads: one reads 3 to 8 GB/s from the page cache
PIECE_BYTES = 1 << 24  # that a thread reads at a time, at most
LEAST_PIECE_BYTES = 1 << 20  # of what is divided among the threads
# Bytes between two runs that are read too, and dropped: reading them takes less than a call of the
# system for each run, in which threads wait for each other.
MOST_GAP_BYTES = 1 << 15
RUNS_AT_ONCE = 512  # half of the buffers that a call of the system takes

# The prefixes of a text model's tensors, in place of "model.", in checkpoints with towers and in
# those of Nemotron-H.
TEXT_PREFIXES = (
    "model.language_model.", "language_model.model.", "language_model.", "backbone.",
)  # fmt: skip
# The head, and its names in some of them.
HEAD = "lm_head"
TEXT_HEADS = ("language_model.lm_head", "model.language_model.lm_head")
# The module that some checkpoints have around their vision tower, and without it.
TOWER_MODULE = ("vision_tower.vision_model.", "vision_tower.")
# The prefix of all tensors of the part for text, in checkpoints with several parts.
PART_PREFIX = "thinker."

Buffer = Callable[[int], Tensor]  # makes host memory from which a device copies


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not fit its config."""


class Stored(NamedTuple):
    """A tensor in a file: its data begins at byte `begin` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


class Cut(NamedTuple):
    """A part of a tensor of `shape`: from `start` to `stop` along `axis`, where it is `seen` so."""

    shape: tuple[int, ...]
    seen: tuple[int, ...]
    axis: int
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Cut:
        return cls(shape, (math.prod(shape),), 0, 0, math.prod(shape))

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor."""
        return tensor.view(self.seen).narrow(self.axis, self.start, self.stop - self.start)

    @property
    def num_runs(self) -> int:
        """The number of runs: parts without gaps."""
        return math.prod(self.seen[: self.axis])

    @property
    def step(self) -> int:
        """The distance between the beginnings of two runs, in numbers."""
        return math.prod(self.seen[self.axis :])

    @property
    def unit(self) -> int:
        """The numbers in a row or column of a run."""
        return math.prod(self.seen[self.axis + 1 :])


class _Piece(NamedTuple):
    """Numbers to read from `file`, from byte `begin` on, to `out`, which has one dimension.

    They are in runs of `run_bytes`, each of which begins `step_bytes` after the one before it.
    """

    file: File
    begin: int
    dtype: torch.dtype
    out: Tensor
    run_bytes: int
    step_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.out.numel() * self.dtype.itemsize

    def fill(self, out: Tensor) -> None:
        """Read to `out`, bytes on the host."""
        view, size = _bytes_of(out), self.run_bytes
        runs = [view[i : i + size] for i in range(0, len(view), size or 1)]
        for first in range(0, len(runs), RUNS_AT_ONCE):
            some = runs[first : first + RUNS_AT_ONCE]
            self.file.fill_runs(some, self.begin + first * self.step_bytes, self.step_bytes)


def plain_buffer(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


class Checkpoint:
    """The tensors in a folder's safetensors files. Files are opened on first use, and closed at the
    end of a `with` block.

    `buffer` makes the memory through which tensors go to a device. Raises CheckpointError, with the
    name of the missing or damaged file.

    The tensors of a text model have the names that they have in a text-only checkpoint.
    """

    def __init__(self, folder: Path, buffer: Buffer = plain_buffer) -> None:
        self.folder, self._buffer = folder, buffer
        self._files: dict[Path, File] = {}
        self._buffers: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(READERS, "read-weights")
        try:
            located = self._locate()
        except BaseException:
            self.close()
            raise
        self._stored = {plain_name(name): name for name in located}
        self._paths = {name: located[stored] for name, stored in self._stored.items()}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self._paths)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def stored_dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors names it."""
        return self._find(name)[1].dtype

    def read(self, wanted: Iterable[tuple[str, Tensor]]) -> None:
        """Copy tensors, by name, to contiguous ones of the same shapes: see `read_parts`."""
        self.read_parts((name, out, Cut.whole(tuple(out.shape))) for name, out in wanted)

    def read_parts(self, wanted: Iterable[tuple[str, Tensor, Cut]]) -> None:
        """Copy parts of tensors, by name, to contiguous tensors on any device.

        Floating point numbers are converted to the dtype of the target. Others, such as packed
        ones, must be stored in it. Reads these parts alone, in the order of the files. Raises
        CheckpointError for a tensor that is missing, of another shape, or of such a dtype.
        """
        wanted = list(wanted)
        # all threads have work, also for few bytes
        share = sum(out.nbytes for _, out, _ in wanted) // READERS + 1
        most = min(PIECE_BYTES, max(share, LEAST_PIECE_BYTES))
        pieces = [piece for one in wanted for piece in self._pieces(*one, most)]
        pieces.sort(key=lambda piece: (piece.file.path, piece.begin))
        if any(_staged(piece) for piece in pieces) and self._buffers.empty():
            for _ in range(READERS):  # not in a thread, whose current device may differ
                self._buffers.put(self._buffer(PIECE_BYTES))
        batches = _batches(pieces, most)
        if len(batches) == 1:
            self._fill(batches[0])
        else:
            list(self._pool.map(self._fill, batches))

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor, as stored."""
        file, stored = self._find(name)
        dtype, size = self._dtype(name, torch.float32), torch.Size(stored.shape[1:]).numel()
        out = torch.empty((rows.stop - rows.start, *stored.shape[1:]), dtype=dtype)
        begin = stored.begin + rows.start * size * dtype.itemsize
        self._fill([_Piece(file, begin, dtype, out.view(-1), out.nbytes, 0)])
        return out

    def _pieces(self, name: str, out: Tensor, cut: Cut, most_bytes: int) -> list[_Piece]:
        file, stored = self._find(name)
        dtype = self._dtype(name, out.dtype)
        if stored.shape != cut.shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has shape {list(stored.shape)}, but the config asks "
                f"for {list(cut.shape)}"
            )
        size, run_len = max(1, most_bytes // dtype.itemsize), (cut.stop - cut.start) * cut.unit
        if not run_len:
            return []
        run_bytes, step_bytes = run_len * dtype.itemsize, cut.step * dtype.itemsize
        begin = stored.begin + cut.start * cut.unit * dtype.itemsize
        runs = out.view(cut.num_runs, run_len)
        if run_len <= size:  # several runs in a piece
            num = size // run_len
            return [
                _Piece(file, begin + i * num * step_bytes, dtype, part, run_bytes, step_bytes)
                for i, part in enumerate(map(torch.flatten, runs.split(num)))
            ]
        piece_bytes = size * dtype.itemsize
        return [
            _Piece(file, begin + r * step_bytes + i * piece_bytes, dtype, part, piece_bytes, 0)
            for r, run in enumerate(runs)
            for i, part in enumerate(run.split(size))
        ]

    def _fill(self, pieces: Sequence[_Piece]) -> None:
        for piece in pieces:
            if not _staged(piece):
                piece.fill(piece.out.view(torch.uint8))
                continue
            buffer = self._buffers.get()
            try:
                staged = buffer[: piece.num_bytes]
                piece.fill(staged)
                with self._lock:  # a copy is faster than a read; some devices take one at a time
                    piece.out.copy_(staged.view(piece.dtype))
            finally:
                self._buffers.put(buffer)

    def _find(self, name: str) -> tuple[File, Stored]:
        if name not in self._paths:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        file, name = self._file(self._paths[name]), self._stored[name]
        if name not in file.tensors:
            raise CheckpointError(
                f"{file.path}: tensor {name} cannot be read: the index names this file, which does "
                "not have it"
            )
        return file, file.tensors[name]

    def _file(self, path: Path) -> File:
        if path not in self._files:
            self._files[path] = File(path)
        return self._files[path]

    def _dtype(self, name: str, wanted: torch.dtype) -> torch.dtype:
        """The dtype of a tensor that is read to one of dtype `wanted`. Raises CheckpointError."""
        _, stored = self._find(name)
        is_packed = wanted in PACKED_DTYPES.values()
        found = (PACKED_DTYPES if is_packed else DTYPES).get(stored.dtype)
        if found is not None and found is (wanted if is_packed else found):
            return found
        asked = str(wanted).removeprefix("torch.") if is_packed else FLOATING_POINT
        raise self._dtype_error(name, asked)

    def _dtype_error(self, name: str, asked: str) -> CheckpointError:
        """The error for a tensor that is not stored in the dtype that is asked for."""
        file, _ = self._find(name)
        with safe_open(file.path, framework="pt") as opened:
            dtype = str(opened.get_tensor(self._stored[name]).dtype).removeprefix("torch.")
        why = "it is quantized, but config.json has no quantization_config for it"
        if asked != FLOATING_POINT:
            why = f"its format asks for {asked}"
        return CheckpointError(f"{self.folder}: tensor {name} is stored as {dtype}: {why}")

    def _locate(self) -> dict[str, Path]:
        """The file of each tensor: model.safetensors, else by the index, else all files."""
        folder = self.folder
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if index.is_file() and not single.is_file():
            return _indexed(index)
        # Files beside model.safetensors hold the same weights under other names, or adapters.
        paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"{folder}: no .safetensors file; formats that can run code are not read, and a "
                "GGUF file is named by its path, or on the Hub as owner/name:TYPE"
            )
        return {name: path for path in paths for name in self._file(path).tensors}


class File:
    """An open safetensors file and its header."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt"):  # checks the header, and the file's size
                self._open(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from error
        header_len = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(header_len))
        self.tensors = {
            name: Stored(one["dtype"], tuple(one["shape"]), 8 + header_len + one["data_offsets"][0])
            for name, one in header.items()
            if name != "__metadata__"
        }

    def _open(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._file = path.open("rb", buffering=0)

    def close(self) -> None:
        self._file.close()

    def fill(self, out: Tensor, begin: int) -> None:
        """Read the file from byte `begin` on to `out`, which holds bytes on the host.

        Raises CheckpointError if the file ends too early.
        """
        self._fill(_bytes_of(out), begin)

    def fill_runs(self, runs: Sequence[memoryview], begin: int, step_bytes: int) -> None:
        """Read runs, the first from byte `begin` of the file on, each further one from `step_bytes`
        after the one before it. Raises CheckpointError if the file ends too early."""
        gap_bytes = step_bytes - len(runs[0])
        if len(runs) > 1 and gap_bytes <= MOST_GAP_BYTES and hasattr(os, "preadv"):
            dropped = memoryview(bytearray(gap_bytes))
            parts = [dropped] * (2 * len(runs) - 1)
            parts[::2] = runs
            if self._read(parts, begin) == sum(map(len, parts)):
                return
        for i, run in enumerate(runs):
            self._fill(run, begin + i * step_bytes)

    def _fill(self, left: memoryview, begin: int) -> None:
        while left:
            count = self._read([left], begin)
            if not count:
                raise CheckpointError(f"{self.path}: the file has become shorter")
            left, begin = left[count:], begin + count

    def _read(self, parts: list[memoryview], begin: int) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self._file.fileno(), parts, begin)
            with self._lock:  # on Windows a file has one position for all threads
                self._file.seek(begin)
                return self._file.readinto(parts[0]) or 0
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error


def plain_name(name: str) -> str:
    """The name that a tensor or module has in a checkpoint without other parts or towers."""
    name = name.removeprefix(PART_PREFIX)
    for head in TEXT_HEADS:
        if f"{name}.".startswith(f"{head}."):
            return HEAD + name.removeprefix(head)
    name = name.replace(*TOWER_MODULE)
    prefix = next((one for one in TEXT_PREFIXES if name.startswith(one)), None)
    return name if prefix is None else "model." + name.removeprefix(prefix)


def spellings(module: str) -> list[str]:
    """The names of a text model's module that `plain_name` turns into this one; it is the first."""
    found = [module]
    if module == HEAD:
        found += TEXT_HEADS
    elif module.startswith("model."):
        found += [prefix + module.removeprefix("model.") for prefix in TEXT_PREFIXES]
    return found + [PART_PREFIX + one for one in found]


def _staged(piece: _Piece) -> bool:
    """True if a piece must be read to host memory first."""
    return piece.out.device.type != "cpu" or piece.out.dtype is not piece.dtype


def _bytes_of(out: Tensor) -> memoryview:
    """The memory of a tensor on the host."""
    # through a numpy array the tensor's storage could not be freed (sleep)
    return memoryview((ctypes.c_char * out.nbytes).from_address(out.data_ptr())).cast("B")


def _batches(pieces: Sequence[_Piece], most_bytes: int) -> list[list[_Piece]]:
    """Groups neighbours up to the size of one piece: small pieces are not worth a task each."""
    batches: list[list[_Piece]] = [[]]
    num_bytes = 0
    for piece in pieces:
        num_bytes += piece.num_bytes
        if num_bytes > most_bytes and batches[-1]:
            batches.append([])
            num_bytes = piece.num_bytes
        batches[-1].append(piece)
    return batches


def _indexed(index: Path) -> dict[str, Path]:
    """The file of each tensor in an index."""
    folder = index.parent
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        located = {tensor: folder / name for tensor, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a readable index: {error}") from error
    for name in dict.fromkeys(weight_map.values()):
        # both kinds of separators on every system, since checkpoints move between systems
        if not name.endswith(".safetensors") or any(one in name for one in "/\\:\0"):
            raise CheckpointError(
                f"{index}: it names the file {name!r}: it must be a .safetensors file beside the "
                "index"
            )
    missing = sorted({path.name for path in located.values() if not path.is_file()})
    if missing:
        raise CheckpointError(f"{folder}: the index names {missing[0]}, which does not exist")
    return located
