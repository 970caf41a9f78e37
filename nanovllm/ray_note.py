"""The address of the Ray cluster that `ray start` has written to a file of this machine. A driver
runs code that its cluster sends, so a note of another user must not choose the cluster. All users
may write to the folder of Ray's note. Others cannot write to our note, but they can put back one of
an earlier cluster and answer at its address, so the owner of the cluster's process is checked
too."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from nanovllm.kernels import private_files

logger = logging.getLogger(__name__)

_MAX_BYTES = 1000
_LISTENING = "0A"  # the state in /proc/net/tcp
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def address(note: Path) -> str | None:
    """The address in a note; None if there is none. If others may have put it there, logs this and
    returns None."""
    try:
        text = _content(note)
        problem = _problem(note, text)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, private_files.UnsafePath) as error:
        text, problem = "", str(error)
    if not problem:
        return text or None
    hint = f" (RAY_ADDRESS={text} uses this cluster)" if text else ""
    logger.warning("the Ray cluster that %s names is not used: %s%s", note, problem, hint)
    return None


def _content(note: Path) -> str:
    """The content of a file that only this user or root has written and may write to."""
    with open(os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        mode = stat.S_IMODE(found.st_mode)
        if not stat.S_ISREG(found.st_mode):
            raise private_files.UnsafePath("it is not a file")
        is_shared = mode & 0o002 or (mode & 0o020 and not private_files.is_own_group(found.st_gid))
        if found.st_uid not in (private_files.ROOT_USER, os.getuid()) or is_shared:
            raise private_files.UnsafePath(f"user {found.st_uid} owns it and its mode is {mode:o}")
        return file.read(_MAX_BYTES).decode().strip()


def _problem(note: Path, text: str) -> str | None:
    """Why this user's or root's note may have been put there by others; None if it has not."""
    try:
        private_files.refuse_shared_parents(note)
    except private_files.UnsafeParent as error:
        port = text.rpartition(":")[2]
        users = _listening_users(int(port)) if port.isdecimal() else set()
        if not users or users - {private_files.ROOT_USER, os.getuid()}:
            return f"others may have put it there, as they may write to {error.parent}"
    return None


def _listening_users(port: int) -> set[int]:
    """The ids of the users whose processes listen on a TCP port of this machine."""
    found = set()
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:  # not Linux, or no IPv6
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(int(fields[7]))
    return found
