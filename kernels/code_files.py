"""Files that hold compiled code.

They are in private folders (`private_files.py`), are written atomically, and are checked before
use.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from nanovllm.kernels.private_files import (
    UnsafeParent,
    UnsafePath,
    accept_parent,
    make_private,
    read_private,
    refuse_shared_parents,
)

logger = logging.getLogger(__name__)

# Prefixes of files and folders that exist while they are written. A killed process leaves them.
WRITING, BUILDING = ".writing-", ".building-"


# Where temporary files are, besides the folder that the environment names.
_OTHER_TEMPORARY = ("/tmp", "/var/tmp")


@functools.cache
def temporary_folder() -> Path:
    """A private folder that is deleted when this process ends. Raises OSError.

    It is in the first folder of temporary files in which other users can replace nothing of ours.
    If there is none, it logs a warning: an engine must start on such a machine too.
    """
    folder = Path(tempfile.mkdtemp(prefix="nanovllm-", dir=_temporary_place()))
    atexit.register(_delete_own, folder, os.getpid())
    return folder


def _temporary_place() -> str:
    named = tempfile.gettempdir()
    problem: UnsafeParent | None = None
    for place in (named, *_OTHER_TEMPORARY):
        try:
            refuse_shared_parents(Path(place, "nanovllm"))
        except UnsafeParent as error:
            problem = problem or error
        except OSError:
            continue
        else:
            if os.access(place, os.W_OK):
                return place
    if problem is not None:
        logger.warning("no folder for temporary files is safe: %s", problem)
        accept_parent(Path(named))
    return named


def _delete_own(folder: Path, process_id: int) -> None:
    if os.getpid() == process_id:  # a fork of the process that made it does not delete it
        shutil.rmtree(folder, ignore_errors=True)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file atomically: readers find all of it or nothing, even if the disk is full.

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


class CodeFolder:
    """A private folder of compiled code, each file with its digest in a file beside it.

    A folder that cannot be made is replaced by one for this process only.
    """

    def __init__(self, folder: Path) -> None:
        try:
            make_private(folder)
        except (OSError, UnsafeParent) as error:
            logger.warning("compiled code is kept for this process only: %s", error)
            folder = temporary_folder()
        self._folder = folder

    def get(self, name: str, key: str, suffix: str, build: Callable[[], bytes]) -> bytes:
        """The code kept under a key, or what `build` returns, which is kept from then on."""
        path = self._folder / f"{name}-{digest(key.encode())[:32]}{suffix}"
        recorded = path.with_suffix(".sha256")
        if (found := read_whole(path, recorded)) is not None:
            return found
        content = build()
        try:
            # The digest is written last: a file without one is not used.
            write_whole(path, content)
            write_whole(recorded, digest(content).encode())
        except OSError as error:  # a full disk, or a folder that is read only
            logger.warning("compiled code is kept for this process only: %s", error)
        return content


def read_whole(path: Path, recorded: Path) -> bytes | None:
    """The content of a file whose digest is in `recorded`; None, with a warning where something is
    wrong, if it must be compiled again."""
    try:
        expected, content = read_private(recorded).decode(), read_private(path)
    except UnsafePath as error:
        logger.warning("compiling it again: %s", error)
        return None
    except (OSError, UnicodeDecodeError):
        return None
    if digest(content) != expected:
        logger.warning("%s is damaged: compiling it again", path)
        return None
    return content
