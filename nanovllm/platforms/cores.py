"""The number of cores this process may use, by CPU affinity and the limits of control groups."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = CGROUPS, own_groups: Path = Path("/proc/self/cgroup")) -> int:
    """Whole cores, at least one. More threads would make every parallel loop wait for a time
    slice."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(cgroups, own_groups)])))


def _quotas(cgroups: Path, own_groups: Path) -> list[float]:
    """Limits in cores: cpu.max of the process's group and its parents (version 2), or the quota of
    version 1."""
    folders = [cgroups]
    try:
        lines = own_groups.read_text().splitlines()
        group = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    except OSError:
        group = ""
    for name in filter(None, group.split("/")):
        folders.append(folders[-1] / name)
    pairs = [_numbers(folder / "cpu.max") for folder in folders]
    cpu = cgroups / "cpu"  # version 1
    pairs.append(_numbers(cpu / "cpu.cfs_quota_us") + _numbers(cpu / "cpu.cfs_period_us"))
    return [pair[0] / pair[1] for pair in pairs if len(pair) == 2 and pair[0] > 0 and pair[1] > 0]


def _numbers(file: Path) -> list[float]:
    """The numbers in a file; none if the file does not exist or contains "max"."""
    try:
        return [float(word) for word in file.read_text().split() if word != "max"]
    except (OSError, ValueError):
        return []
