"""Which files and folders other users cannot change.

Code is kept in files and run later. So a file must belong to this user, and no other user may write
to it, to its folder, or to a folder above: a user who can rename a folder can replace it.

A folder above is safe if root or this user owns it, and others cannot write to it or it is sticky
(as /tmp is). The group may write to it if the group is this user's own, as on systems where each
user has a group of the same name. Systems without user ids are not checked.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

PRIVATE = 0o700
ROOT_USER = 0
_MAX_LINKS = 40  # Linux's own limit
_ACL = "system.posix_acl_access"


class UnsafePath(ValueError):
    """A file or folder for compiled code that another user owns or may write to, or replace.

    That user could make us run their code.
    """


class UnsafeParent(UnsafePath):
    """A folder above (`parent`) that another user owns or may write to."""

    def __init__(self, message: str, parent: Path) -> None:
        super().__init__(message)
        self.parent = parent


def make_private(*folders: Path) -> None:
    """Make folders that only their owner can enter; refuse existing ones that others may write to
    or replace. Folders above that are missing are made in the same way.

    Raises OSError if a folder cannot be made, and UnsafePath.
    """
    for folder in folders:
        make_folders(folder)
        refuse_if_shared(folder)
        refuse_shared_parents(folder)


def make_folders(folder: Path) -> None:
    """Make a folder and the missing ones above it, all with mode 700, whatever the umask is.

    Raises OSError.
    """
    missing = []
    path = folder.absolute()
    while not os.path.lexists(path):
        missing.append(path)
        path = path.parent
    for path in reversed(missing):
        try:
            path.mkdir(mode=PRIVATE)
        except FileExistsError:  # another process has made it
            continue
        path.chmod(PRIVATE)  # a umask may take away the owner's own rights
    folder.mkdir(exist_ok=True)  # raises the error of what is there and is no folder


def refuse_if_shared(path: Path) -> None:
    """Raise UnsafePath if another user owns, or may write to, a file, a folder or a link to it."""
    if not hasattr(os, "getuid") or not path.exists():
        return
    owner = foreign_owner(path)
    _refuse(path, path.stat(), os.getuid() if owner is None else owner)


def read_private(path: Path) -> bytes:
    """The content of a file that is not a link, checked as in `refuse_if_shared`.

    What is checked is what is read, even if the name is given to another file meanwhile. Raises
    OSError and UnsafePath.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        if hasattr(os, "getuid"):
            found = os.fstat(file.fileno())
            _refuse(path, found, found.st_uid)
        return file.read()


def _refuse(path: Path, found: os.stat_result, owner: int) -> None:
    mode, me = stat.S_IMODE(found.st_mode) & 0o777, os.getuid()
    if owner != me or mode & 0o022:
        own_mode = 0o700 if stat.S_ISDIR(found.st_mode) else 0o600
        raise UnsafePath(
            f"{path} is for compiled code, but user {owner} owns it and its mode is {mode:o}: it "
            f"must belong to user {me} and be writable by nobody else (use chmod {own_mode:o}, or "
            "another folder through NANOVLLM_CACHE)"
        )


def foreign_owner(path: Path) -> int | None:
    """The id of another user who owns a file or a link to it; None if there is none."""
    if hasattr(os, "getuid"):
        for owner in (path.lstat().st_uid, path.stat().st_uid):
            if owner != os.getuid():
                return owner
    return None


def refuse_shared_parents(path: Path) -> None:
    """Raise UnsafeParent if another user could put something else in the place of `path`, which
    need not exist. Raises OSError if a folder above is missing.
    """
    if not hasattr(os, "getuid"):
        return
    for parent, found in _passed(path):
        mode = stat.S_IMODE(found.st_mode)
        is_safe = stat.S_ISLNK(found.st_mode) or _is_ours(parent, found)
        if (is_safe and found.st_uid in _trusted()) or parent in _accepted:
            continue
        advice = f"chmod go-w {parent}" if found.st_uid in _trusted() else "another folder"
        raise UnsafeParent(
            f"{path} is for compiled code, but other users may replace it: user {found.st_uid} "
            f"owns {parent} and its mode is {mode:o} (use {advice}, or NANOVLLM_CACHE for a folder "
            "below one that only you and root may write to)",
            parent,
        )


def accept_parent(folder: Path) -> None:
    """Let this process keep code below a folder that others may write to: it has no other."""
    _accepted.update(parent for parent, _ in _passed(folder / "file"))


_accepted: set[Path] = set()


def _passed(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The folders and links that a lookup of `path` passes, from the root on, and `path` itself if
    it is a link. Raises OSError."""
    left = list(reversed(path.absolute().parts))
    here, num_links = Path(left.pop()), 0
    while left:
        yield here, here.lstat()
        name = left.pop()
        if name == "..":  # no link is left in `here`
            here = here.parent
            continue
        following = here / name
        if not left and not os.path.lexists(following):
            return  # what is not there yet; its folder has been passed
        found = following.lstat()
        if not stat.S_ISLNK(found.st_mode):
            here = following
            continue
        num_links += 1
        if num_links > _MAX_LINKS:
            raise OSError(f"{path} has too many links")
        yield following, found
        target = Path(os.readlink(following))
        left += reversed(target.parts)
        if target.is_absolute():
            here = Path(left.pop())


def _is_ours(folder: Path, found: os.stat_result) -> bool:
    """Whether no other user may replace a folder's entries that belong to this user or root."""
    mode = found.st_mode
    if mode & stat.S_ISVTX:
        return True
    if mode & stat.S_IWOTH:
        return False
    return not mode & stat.S_IWGRP or (is_own_group(found.st_gid) and not _has_acl(folder))


def _has_acl(folder: Path) -> bool:
    """Whether an access list names more users; the group's bits are then its mask."""
    if not hasattr(os, "listxattr"):
        return False
    try:
        return _ACL in os.listxattr(folder)
    except OSError:  # this file system has none
        return False


@functools.cache
def is_own_group(group: int) -> bool:
    """Whether a group is this user's private one: it has the user's name and is the user's primary
    group, and has no other member."""
    import grp
    import pwd

    try:
        me, entry = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    if me.pw_gid != group or entry.gr_name != me.pw_name or set(entry.gr_mem) - {me.pw_name}:
        return False
    return all(one.pw_gid != group or one.pw_uid == me.pw_uid for one in pwd.getpwall())


def _trusted() -> tuple[int, ...]:
    """The owners of folders that are safe: root, this user, and the users of `_outside`."""
    return ROOT_USER, os.getuid(), *_outside()


@functools.cache
def _outside() -> tuple[int, ...]:
    """The id that stands for all users outside of this user namespace, the machine's root among
    them, if no process inside can have it. Containers without privileges show /home so."""
    try:
        number = int(Path("/proc/sys/kernel/overflowuid").read_text())
        lines = Path("/proc/self/uid_map").read_text().splitlines()
        ranges = [(int(line.split()[0]), int(line.split()[2])) for line in lines]
    except (OSError, ValueError, IndexError):
        return ()
    return () if any(first <= number < first + count for first, count in ranges) else (number,)
