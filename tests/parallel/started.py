"""Ranks whose program is child.py, and what must be left of them: nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from nanovllm.parallel.group import Group
from nanovllm.parallel.ranks import WorkerGroup

MODULE = "tests.parallel.child"
# For what takes up to some seconds on an idle machine. Ranks of tests wait for 100 s.
WAIT_S = 60.0


@contextmanager
def started(size: int, folder: Path, **setup: Any) -> Iterator[WorkerGroup]:
    """Ranks with a private folder within `folder`; afterwards nothing of them may be left."""
    ranks = WorkerGroup.start(setup, size, MODULE, folder)
    pids = ranks.pids
    try:
        yield ranks
    finally:
        before = time.monotonic()
        ranks.close()
        assert time.monotonic() - before < WAIT_S
        assert not any(is_running(pid) for pid in pids)
        assert not list(folder.iterdir())


def joined(ranks: WorkerGroup, kind: str = "cpu") -> Group:
    """Rank 0's group, after all ranks have made theirs; a failure aborts it."""
    device, size = torch.device(kind, 0), len(ranks.pids) + 1
    group, _ = ranks.call_all(
        "join", kind.encode(), lambda: Group(0, size, device, ranks.folder, ranks.check)
    )
    ranks.call_on_failure(lambda _: group.abort())
    return group


def is_running(pid: int) -> bool:
    """Whether a process exists that is no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_gone(pids: list[int], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} some run after {seconds} s"
        time.sleep(0.02)


def listening(pid: int) -> set[str]:
    """The addresses, as hexadecimal text, on which a process listens for TCP connections."""
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets.add(os.readlink(fd))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found
