"""Replicas on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.replicas import cluster
from tests.ray_nodes import LOOPBACK, two_nodes_of

ROOT = Path(__file__).parents[2]
NUM_ROWS = 2000


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes with one CPU each, on the loopback interface."""
    with two_nodes_of(1) as made:
        yield made


def test_2000_rows_survive_the_loss_of_a_node(two_nodes: Any, tmp_path: Path) -> None:
    """The last test of this cluster: it ends a node."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": f"id {i}", "prompt": f"{i} + {i % 7} ="} for i in range(NUM_ROWS)]
    rows[19] = {"id": "id 19", "prompt": ""}
    source.write_text("\n".join(map(json.dumps, rows)))
    words = [
        "--params",
        '{"max_tokens": 8, "temperature": 0, "ignore_eos": true}',
        "--enforce-eager",
        "--no-progress",
    ]
    words += ["--device", "cpu", "--replicas", "2", "--ray-address", two_nodes.address]
    line = [sys.executable, "-m", "nanovllm", "batch", str(source), "-o", str(target), *words]
    job = subprocess.Popen(
        line, cwd=ROOT, env={**os.environ, **LOOPBACK}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (target.exists() and target.read_bytes().count(b"\n") >= NUM_ROWS // 2):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    num_before = target.read_bytes().count(b"\n")
    two_nodes.remove_node(two_nodes.second, allow_graceful=False)
    stdout, stderr = job.communicate(timeout=120)
    assert job.returncode == 0, stderr
    assert num_before < NUM_ROWS * 3 // 4 and "are tried again" in stderr
    found = [json.loads(one) for one in target.read_text().splitlines()]
    assert [row["row"] for row in found] == list(range(NUM_ROWS))
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["row"] for row in found if "error" in row] == [19]
    assert f"{NUM_ROWS:,} of {NUM_ROWS:,} rows written, 0 left; 1 errors" in stdout


@pytest.mark.parametrize(
    ("num", "cpus", "wanted"),
    [(1, [16], 16), (2, [16], 8), (3, [16], 5), (2, [4, 2], 2), (2, [3, 3], 3), (6, [4, 2], 1)],
)
def test_replicas_on_cpus_get_equal_shares(num: int, cpus: list[int], wanted: int) -> None:
    nodes = [{"CPU": float(one)} for one in cpus]
    assert cluster.share(EngineConfig("m"), num, nodes) == {"num_cpus": wanted}


def test_replicas_get_whole_gpus_where_there_are_some() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 64.0}]
    for device in ("auto", "cuda"):
        found = cluster.share(EngineConfig("m", device=device), 3, nodes)
        assert found == {"num_cpus": 0, "num_gpus": 1}
    assert cluster.share(EngineConfig("m", device="cpu"), 4, nodes) == {"num_cpus": 16}
    with pytest.raises(ValueError, match=r"4 replicas need 1 GPU\(s\) each, .* have 2, 1, 0"):
        cluster.share(EngineConfig("m"), 4, nodes)
    with pytest.raises(ValueError, match="have 0"):
        cluster.share(EngineConfig("m", device="cuda"), 1, [{"CPU": 8.0}])
    with pytest.raises(ValueError, match="device is 'cuda:1': Ray assigns the devices of replicas"):
        cluster.share(EngineConfig("m", device="cuda:1"), 1, nodes)
