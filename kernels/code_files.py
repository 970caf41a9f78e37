"""Files that hold compiled code.

They are in folders that only their owner can write, are written atomically, and are checked before
use.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

PRIVATE = 0o700


def make_private(*folders: Path) -> None:
    """Make folders that only their owner can enter; refuse existing ones that others may write to.

    Raises OSError if a folder cannot be made, and ValueError for a folder that another user owns or
    may write to: that user could make us run their code.
    """
    for folder in folders:
        # one at a time: `parents` gives the folders above the mode of the umask
        folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
        refuse_if_shared(folder)


def refuse_if_shared(path: Path) -> None:
    """ValueError for a file or folder that another user owns or may write to.

    Systems without user ids are not checked.
    """
    if not hasattr(os, "getuid") or not path.exists():
        return
    status = path.stat()
    owner, mode = status.st_uid, status.st_mode & 0o777
    if owner != os.getuid() or mode & 0o022:
        raise ValueError(
            f"{path} is for compiled code, but user {owner} owns it and its mode is {mode:o}: it "
            f"must belong to user {os.getuid()} and be writable by nobody else (use chmod 700, or "
            "another folder through NANOVLLM_CACHE)"
        )


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: others see all of it or nothing, even if the disk is full.

    Raises OSError.
    """
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
