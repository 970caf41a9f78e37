"""A private folder for a process and its children that is eventually removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "nanovllm-"
IN_USE = ".in-use"  # a file locked by the process; the lock ends with the process


class PrivateFolder:
    """A new folder that only this user can enter (mode 0700).

    `remove` deletes it. If the process is killed first, the next `PrivateFolder` in the same parent
    deletes it.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """parent: the parent folder (None: the temporary folder). Raises OSError."""
        place = parent or Path(tempfile.gettempdir())
        remove_left(place)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        lock = self.path / f"{IN_USE}.new"
        self._lock = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        lock.rename(self.path / IN_USE)  # it never exists unlocked under this name

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_left(place: Path) -> None:
    """Remove this user's folders whose processes were killed."""
    for path in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # not such a folder, or in use
            if path.is_symlink() or path.lstat().st_uid != os.getuid():
                continue
            lock = os.open(path / IN_USE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
