"""Files that hold compiled code.

They are in folders that only their owner can write, are written atomically, and are checked before
use.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

PRIVATE = 0o700
# Prefixes of files and folders that exist while they are written. A killed process leaves them.
WRITING, BUILDING = ".writing-", ".building-"


class Shared(ValueError):
    """A file or folder for compiled code that another user owns or may write to.

    That user could make us run their code.
    """


def make_private(*folders: Path) -> None:
    """Make folders that only their owner can enter; refuse existing ones that others may write to.

    Raises OSError if a folder cannot be made, and Shared.
    """
    for folder in folders:
        # one at a time: `parents` gives the folders above the mode of the umask
        folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
        refuse_if_shared(folder)


def refuse_if_shared(path: Path) -> None:
    """Raise Shared if another user owns a file, a folder or a link to it, or may write to it.

    Systems without user ids are not checked.
    """
    if not hasattr(os, "getuid") or not path.exists():
        return
    mode, own_mode = path.stat().st_mode & 0o777, 0o700 if path.is_dir() else 0o600
    me, owner = os.getuid(), foreign_owner(path)
    if owner is not None or mode & 0o022:
        raise Shared(
            f"{path} is for compiled code, but user {me if owner is None else owner} owns it and "
            f"its mode is {mode:o}: it must belong to user {me} and be writable by nobody else "
            f"(use chmod {own_mode:o}, or another folder through NANOVLLM_CACHE)"
        )


def foreign_owner(path: Path) -> int | None:
    """The user id of somebody else who owns a file or a link to it; None if there is nobody."""
    if hasattr(os, "getuid"):
        for owner in (path.lstat().st_uid, path.stat().st_uid):
            if owner != os.getuid():
                return owner
    return None


@functools.cache
def temporary_folder() -> Path:
    """A private folder that is deleted when this process ends. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix="nanovllm-"))
    atexit.register(_delete_own, folder, os.getpid())
    return folder


def _delete_own(folder: Path, process_id: int) -> None:
    if os.getpid() == process_id:  # a fork of the process that made it leaves it alone
        shutil.rmtree(folder, ignore_errors=True)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file atomically: others see all of it or nothing, even if the disk is full.

    Raises OSError.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=WRITING)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
