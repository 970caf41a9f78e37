"""A Ray cluster of two nodes on this machine, for tests, and what its processes listen on."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
LISTENING = "0A"  # the state in /proc/net/tcp


@contextmanager
def two_nodes_of(num_cpus: int) -> Iterator[Any]:
    """Two nodes with so many CPUs each, on the loopback interface. `second` is the one that tests
    may remove."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOOPBACK.items():  # read when Ray is imported
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        node = {
            "num_cpus": num_cpus, "object_store_memory": 100 << 20, "node_ip_address": "127.0.0.1",
            "include_dashboard": False,
        }  # fmt: skip
        made = Cluster(initialize_head=True, head_node_args=node)
        try:
            made.second = made.add_node(**node)
            yield made
        finally:
            made.shutdown()


def family(pid: int) -> list[int]:
    """The living processes of this session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def listening(pids: list[int]) -> list[str]:
    """The addresses on which these processes listen, as hexadecimal text."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    return [
        fields[1].partition(":")[0]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if (fields := line.split())[3] == LISTENING and f"socket:[{fields[9]}]" in inodes
    ]


def loopback() -> set[str]:
    """127.0.0.1 and ::1 as /proc/net writes them, and the former as an address of IPv6."""
    words = [socket.inet_pton(socket.AF_INET, "127.0.0.1")]
    for text in ("::1", "::ffff:127.0.0.1"):
        packed = socket.inet_pton(socket.AF_INET6, text)
        words.append(packed)
    order = -1 if sys.byteorder == "little" else 1
    return {
        "".join(word[i : i + 4][::order].hex() for i in range(0, len(word), 4)).upper()
        for word in words
    }
