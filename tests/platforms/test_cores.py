"""A CPU engine has at most as many threads as cores that it may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanovllm.platforms import cores, cpu
from nanovllm.platforms.cores import usable_cores
from nanovllm.platforms.cpu import CpuPlatform


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".", 1)).write_text(text)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 8),
        ("300000 100000", 3),
        ("250000 100000", 2),
        ("20000 100000", 1),
        ("9900000 100000", 8),
        ("?", 8),
    ],
)
def test_a_control_groups_limit_counts(tmp_path: Path, quota: str, expected: int) -> None:
    write(tmp_path, cpu__max=quota)
    assert usable_cores(tmp_path, tmp_path / "none") == expected


def test_the_narrowest_of_nested_groups_counts(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/outer/inner\n")
    write(tmp_path / "outer", cpu__max="200000 100000\n")
    write(tmp_path / "outer" / "inner", cpu__max="500000 100000\n")
    assert usable_cores(tmp_path, tmp_path / "own") == 2
    (tmp_path / "own").write_text("0::/other\n")
    assert usable_cores(tmp_path, tmp_path / "own") == 8


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("400000", 4)])
def test_the_first_versions_quota_counts(tmp_path: Path, quota: str, expected: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert usable_cores(tmp_path, tmp_path / "none") == expected


def test_without_affinity_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores(tmp_path, tmp_path / "none") == 5


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("asked", "usable", "expected"), [(3, 2, 2), (1, 2, 1), (2, 2, 2)])
def test_an_engine_lowers_threads_and_never_raises_them(
    monkeypatch: pytest.MonkeyPatch, asked: int, usable: int, expected: int
) -> None:
    assert cpu.usable_cores is cores.usable_cores
    monkeypatch.setattr(cpu, "usable_cores", lambda: usable)
    torch.set_num_threads(asked)
    CpuPlatform().prepare()
    assert torch.get_num_threads() == expected
