"""How many cores this process may use: what the scheduler's affinity and the limits of its control groups leave."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = CGROUPS, own_groups: Path = Path("/proc/self/cgroup")) -> int:
    """Whole cores, at least one. A thread more than these waits for a time slice at every end of a parallel loop."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(cgroups, own_groups)])))


def _quotas(cgroups: Path, own_groups: Path) -> list[float]:
    """Limits in cores: cpu.max of version 2 for this process's group and those around it, or version 1's quota."""
    folders = [cgroups]
    try:
        lines = own_groups.read_text().splitlines()
        group = next(
            (line.split(":", 2)[2].strip("/") for line in lines if line.startswith("0::")), ""
        )
    except (OSError, IndexError):
        group = ""
    for name in filter(None, group.split("/")):
        folders.append(folders[-1] / name)
    pairs = [_numbers(folder / "cpu.max") for folder in folders]
    first_version = cgroups / "cpu"
    pairs.append(
        _numbers(first_version / "cpu.cfs_quota_us") + _numbers(first_version / "cpu.cfs_period_us")
    )
    return [pair[0] / pair[1] for pair in pairs if len(pair) == 2 and pair[0] > 0 and pair[1] > 0]


def _numbers(file: Path) -> list[float]:
    """The numbers in a file; none where it is not there or says "max"."""
    try:
        return [float(word) for word in file.read_text().split() if word != "max"]
    except (OSError, ValueError):
        return []
