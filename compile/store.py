"""The folder of artifacts: private, content-addressed, written atomically, checked on every read.

    entries/<digest of the key>    one artifact's description: a line with its digest, then JSON
    objects/<digest of the bytes>  what lowering produced; equal bytes are stored once
    cpp/  triton/  inductor/       libraries and kernels of the C++ compiler, Triton and Inductor
    bytecode/                      that of installed packages, in some containers (startup/bytecode)

An artifact is code. The store refuses a folder that another user owns, can write to or can replace
(`kernels/private_files.py`), and does not use such files. Artifacts are loaded from the bytes that
were checked. Libraries and kernels can be loaded only by path: no other user can change their
folders after the check. Call lists are JSON. Inductor's artifacts hold pickles; they are
loaded only after their digest is checked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.compile.key import Key
from nanovllm.kernels.code_files import BUILDING, WRITING, digest, write_whole
from nanovllm.kernels.private_files import (
    UnsafePath,
    foreign_owner,
    make_private,
    read_private,
    refuse_if_shared,
)

logger = logging.getLogger(__name__)

FORMAT = 1
SUBFOLDERS = ("entries", "objects", "cpp", "triton", "inductor")
KERNEL_SEAL = "nanovllm.sha256.json"  # beside the files of one Triton kernel
LEFT_AFTER_S = 3600.0  # a file of this age is no longer being written


class Damaged(ValueError):
    """A file of the store differs from what was written."""


UNUSABLE = (Damaged, UnsafePath, OSError)


@dataclass(frozen=True)
class Artifact:
    """A stored program, or what else a start need not make again.

    name: for readers. kind: of a program, the module of lower/ that loads it. result: of a program,
    its `nesting`. ingredients: those of its key.
    """

    name: str
    kind: str
    content: bytes
    result: Any
    ingredients: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """The description of an artifact, without its bytes."""

    path: Path
    name: str
    kind: str
    object: str
    num_bytes: int
    result: Any
    ingredients: dict[str, str]


class Store:
    """Artifacts in a folder.

    Raises OSError if it cannot be made, and UnsafePath if it is not private.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_private(folder, *(folder / name for name in SUBFOLDERS))
        self._can_write = True

    def find(self, key: Key) -> Artifact | None:
        """The artifact of a key, or None. A damaged one causes a warning and counts as absent."""
        path = self._entry_path(key)
        try:
            entry = read_entry(path)
            content = self._object(entry)
        except UNUSABLE as error:
            is_absent = isinstance(error, FileNotFoundError) and error.filename == str(path)
            if not is_absent:
                message = "artifact %s cannot be used (%s): making it again"
                logger.warning(message, path.name[:16], error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # `prune` deletes the least recently used first
        return Artifact(entry.name, entry.kind, content, entry.result, entry.ingredients)

    def save(self, key: Key, artifact: Artifact) -> None:
        """Save an artifact. The first failure, such as a full disk, is logged and ends saving."""
        if not self._can_write:
            return
        name = digest(artifact.content)
        content = {
            "format": FORMAT,
            "name": artifact.name,
            "kind": artifact.kind,
            "object": name,
            "num_bytes": len(artifact.content),
            "result": artifact.result,
            "ingredients": dict(key.ingredients),
        }
        text = json.dumps(content, indent=1).encode()
        try:
            # Write even if the object exists: it may be damaged.
            write_whole(self.folder / "objects" / name, artifact.content)
            write_whole(self._entry_path(key), digest(text).encode() + b"\n" + text)
        except OSError as error:
            self._can_write = False
            logger.warning("compiled programs are not saved: %s", error)

    def entries(self) -> Iterator[Entry]:
        """All readable entries, in no particular order."""
        for path in (self.folder / "entries").iterdir():
            if not path.name.startswith("."):
                try:
                    yield read_entry(path)
                except UNUSABLE:
                    continue

    def why_missing(self, name: str, key: Key) -> str:
        """How the nearest artifact of the same program or region differs from the wanted key."""
        region = name.partition("_")[0]
        near = [
            (entry.name != name, key.differences(entry.ingredients), entry.name)
            for entry in self.entries()
            if entry.name.partition("_")[0] == region
        ]
        if not near:
            return "the store holds no program of this region"
        is_other, differences, nearest = min(near, key=lambda found: (found[0], len(found[1])))
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        shown = "; ".join(differences[:3]) + more
        return f"this bucket is missing; nearest is {nearest}: {shown}" if is_other else shown

    def _entry_path(self, key: Key) -> Path:
        return self.folder / "entries" / key.digest

    def _object(self, entry: Entry) -> bytes:
        path = self.folder / "objects" / entry.object
        content = read_private(path)
        if digest(content) != entry.object:
            raise Damaged(f"object {entry.object[:16]} is damaged: its digest differs")
        return content


def read_entry(path: Path) -> Entry:
    """Read one entry. Raises Damaged, UnsafePath or OSError."""
    recorded, _, text = read_private(path).partition(b"\n")
    if digest(text).encode() != recorded:
        raise Damaged(f"entry {path.name[:16]} is damaged or truncated")
    content = json.loads(text)
    if content["format"] != FORMAT:
        raise Damaged(f"entry {path.name[:16]} has format {content['format']}, not {FORMAT}")
    del content["format"]
    return Entry(path=path, **content)


# Triton kernels ----------------------------------------------------------------------------------


def seal_kernels(folder: Path) -> None:
    """Write the digests of each Triton kernel's files beside them, unless they exist."""
    for kernel in _kernel_folders(folder):
        if not (kernel / KERNEL_SEAL).exists():
            try:
                files = [path for path in kernel.iterdir() if path.is_file()]
                found = {path.name: digest(path.read_bytes()) for path in files}
                write_whole(kernel / KERNEL_SEAL, json.dumps(found).encode())
            except OSError as error:
                logger.warning("digests of compiled kernels are not saved: %s", error)
                return


def drop_damaged_kernels(folder: Path) -> int:
    """Delete Triton kernels whose files differ from their digests or belong to another user.

    Returns how many were deleted. Kernels without digests are left alone: Triton writes atomically
    too.
    """
    damaged = _damaged_kernels(folder)
    for kernel in damaged:
        message = "compiled kernel %s is damaged or another user's: compiling it again"
        logger.warning(message, kernel.name)
        for path in kernel.iterdir():
            path.unlink()
    return len(damaged)


def num_kernels(folder: Path) -> int:
    """The number of kernels that Triton has finished."""
    return len(_kernel_folders(folder))


def _damaged_kernels(folder: Path) -> list[Path]:
    return [kernel for kernel in _kernel_folders(folder) if not _is_whole(kernel)]


def _is_whole(kernel: Path) -> bool:
    """True if the files are ours and match their digests, or if there are no digests.

    The modes of these files are Triton's choice; the folder above keeps other users out. Files that
    this process has checked are read again only once they have changed.
    """
    try:
        sealed = json.loads((kernel / KERNEL_SEAL).read_text())
        state = _state(kernel)
        if _checked.get(kernel) == state:
            return True
        is_whole = all(
            digest((kernel / name).read_bytes()) == found and foreign_owner(kernel / name) is None
            for name, found in sealed.items()
        )
        if is_whole:
            _checked[kernel] = state
        return is_whole
    except FileNotFoundError as error:
        return bool(error.filename == str(kernel / KERNEL_SEAL))
    except (OSError, ValueError, AttributeError):
        return False


_checked: dict[Path, object] = {}  # kernels whose digests were right, and their files' state


def _state(kernel: Path) -> object:
    """This changes when one of a kernel's files does, and for another user."""
    stats = [(entry.name, entry.stat()) for entry in os.scandir(kernel)]
    return os.getuid() if hasattr(os, "getuid") else None, sorted(
        (name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for name, stat in stats
    )


def _kernel_folders(folder: Path) -> list[Path]:
    # Triton writes a kernel's list of files (`__grp__*`) last; a library is alone in its folder
    return [
        path
        for path in (folder / "triton").iterdir()
        if any(name.startswith("__grp__") or name.endswith(".so") for name in _names(path))
    ]


def _names(path: Path) -> list[str]:
    """Names in a folder; none for a file, or for a folder that has just been deleted."""
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []


# Maintenance -------------------------------------------------------------------------------------


def problems(folder: Path) -> list[str]:
    """One line for every damaged entry, object, C++ library and kernel."""
    found: list[str] = []
    store = Store(folder)
    for path in sorted((folder / "entries").iterdir()):
        if path.name.startswith("."):
            continue
        try:
            store._object(read_entry(path))
        except UNUSABLE as error:
            found.append(f"entry {path.name[:16]}: {error}")
    for seal in sorted((folder / "cpp").glob("*.sha256")):
        library = seal.with_suffix(".so")
        if not library.is_file() or digest(library.read_bytes()) != seal.read_text():
            found.append(f"library {library.name} is damaged or missing")
            continue
        try:
            refuse_if_shared(library)
        except UnsafePath as error:
            found.append(f"library {library.name}: {error}")
    owners = "is damaged or another user's"
    return found + [f"kernel {kernel.name} {owners}" for kernel in _damaged_kernels(folder)]


def prune(folder: Path, max_bytes: int) -> int:
    """Delete leftovers of killed processes, then the least recently used files until `max_bytes`
    are left. Returns the bytes freed."""
    store = Store(folder)
    entries = list(store.entries())
    wanted = {entry.object for entry in entries}
    freed = _delete_left_behind(folder)
    for path in (folder / "objects").iterdir():
        # another process may be about to write the entry of a young object
        if path.name not in wanted and _is_old(path):
            freed += _delete([path])
    units = [(entry.path.stat().st_mtime, [entry.path]) for entry in entries]
    for library in (folder / "cpp").glob("*.so"):
        units.append((library.stat().st_mtime, [library, library.with_suffix(".sha256")]))
    for kernel in [*_kernel_folders(folder), folder / "inductor", folder / "bytecode"]:
        files = [path for path in kernel.rglob("*") if path.is_file()]
        if files:
            units.append((max(path.stat().st_mtime for path in files), files))
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    users = {entry.path: entry.object for entry in entries}
    for _, paths in sorted(units, key=lambda unit: unit[0]):
        if total <= max_bytes:
            break
        gone = _delete(paths)
        for path in paths:
            name = users.pop(path, None)
            if name is not None and name not in users.values():
                gone += _delete([folder / "objects" / name])
        total -= gone
        freed += gone
    return freed


def _delete_left_behind(folder: Path) -> int:
    """Delete old files and folders that were being written. Returns the bytes freed."""
    freed = 0
    for pattern in (f"*/{WRITING}*", f"triton/*/{WRITING}*", f"cpp/{BUILDING}*", "triton/*/tmp.*"):
        for path in filter(_is_old, list(folder.glob(pattern))):
            files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
            freed += _delete(files)
            shutil.rmtree(path, ignore_errors=True)  # folders
    return freed


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > LEFT_AFTER_S
    except FileNotFoundError:
        return False


def _delete(paths: list[Path]) -> int:
    """Delete files. Returns the bytes freed."""
    freed = 0
    for path in paths:
        try:
            size = path.stat().st_size
            path.unlink()
            freed += size
        except FileNotFoundError:  # another process deleted it first
            continue
    return freed
