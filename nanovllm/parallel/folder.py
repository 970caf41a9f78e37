"""A private folder of a process and its children, which does not outlast them for long."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "nanovllm-"
IN_USE = ".in-use"  # a file that the process has locked; the system unlocks it with the process


class PrivateFolder:
    """A new folder that only this user can enter (mode 0700).

    `remove` removes it. If its process is killed before, the next folder that is made beside it
    does.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """parent: where the folder is made (None: among the temporary files). Raises OSError."""
        place = parent or Path(tempfile.gettempdir())
        remove_left(place)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        lock = self.path / f"{IN_USE}.new"
        self._lock = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        lock.rename(self.path / IN_USE)  # nobody sees it unlocked

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_left(place: Path) -> None:
    """Remove this user's folders whose processes were killed."""
    for path in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is none of these folders, or it is in use
            if path.is_symlink() or path.lstat().st_uid != os.getuid():
                continue
            lock = os.open(path / IN_USE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
