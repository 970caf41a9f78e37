"""Replicas on a Ray cluster that the job starts itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ray_nodes import family, listening, loopback

ROOT = Path(__file__).parents[2]
NUM_ROWS = 1500


@pytest.fixture
def session() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts a command in a session of its own; nothing of it may be left afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(line: list[str]) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                line, cwd=ROOT, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for one in started:
        for pid in family(one.pid):
            os.kill(pid, signal.SIGKILL)


def engines(pid: int) -> list[int]:
    """The processes of this session without two agents of Ray."""
    agents = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")
    found = []
    for one in family(pid):
        try:
            if not Path(f"/proc/{one}/cmdline").read_bytes().startswith(agents):
                found.append(one)
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_job_listens_on_loopback_leaves_nothing_and_goes_on(
    how: signal.Signals, tmp_path: Path, session: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": i, "prompt": f"{i} + {i % 7} ="} for i in range(NUM_ROWS)]
    source.write_text("\n".join(map(json.dumps, rows)))
    words = ["--params", '{"max_tokens": 2, "temperature": 0}', "--enforce-eager", "--no-progress"]
    line = [sys.executable, "-m", "nanovllm", "batch", str(source), "-o", str(target), *words]
    line += ["--device", "cpu", "--replicas", "2"]
    job = session(line)
    deadline = time.monotonic() + 120
    while not (target.exists() and target.stat().st_size):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    found = listening(family(job.pid))
    if how == signal.SIGINT:  # a terminal sends it to all processes
        os.killpg(job.pid, how)
    else:
        os.kill(job.pid, how)
    assert found and set(found) <= loopback()
    must_end = family
    if how == signal.SIGKILL:  # two of Ray's agents notice it after a minute
        must_end = engines
    else:
        _, stderr = job.communicate(timeout=60)
        assert job.returncode == 130 and "run the same command to resume" in stderr
    while must_end(job.pid):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)
    before = target.read_bytes()
    subprocess.run([*line, "--no-ray"], cwd=ROOT, capture_output=True, check=True)
    assert target.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    answers = [json.loads(one) for one in target.read_text().splitlines()]
    assert [one["id"] for one in answers] == list(range(NUM_ROWS))
