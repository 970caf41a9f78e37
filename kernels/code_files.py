"""Files that hold code: in folders that only their owner can write, written in one piece, checked before they are used."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

PRIVATE = 0o700


def make_private(*folders: Path) -> None:
    """Make folders that only their owner can enter, and refuse those that are there and are not his alone.

    Raises OSError where one cannot be made, ValueError for one that others own or may write to: they could make us run
    their code.
    """
    for folder in folders:
        # one by one: `parents` leaves the mode of the folders above to the umask
        folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
        refuse_if_shared(folder)


def refuse_if_shared(path: Path) -> None:
    """ValueError for a file or folder that others own or may write to. Where a system has no such owners, nothing."""
    if not hasattr(os, "getuid") or not path.exists():
        return
    status = path.stat()
    owner, mode = status.st_uid, status.st_mode & 0o777
    if owner != os.getuid() or mode & 0o022:
        raise ValueError(
            f"{path} is for compiled code, but user {owner} owns it and its mode is {mode:o}: it must belong to user "
            f"{os.getuid()} and be writable by nobody else (chmod 700, or another folder through NANOVLLM_CACHE)"
        )


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all, also when the disk is full; raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
