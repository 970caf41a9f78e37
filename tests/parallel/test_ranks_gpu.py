"""Ranks on GPUs: captured collectives, and a rank that dies while the device waits for it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nanovllm.parallel.errors import RankFailed
from tests.parallel.captured import captured_sums, inputs
from tests.parallel.started import joined, listening, started

pytestmark = pytest.mark.gpus


@pytest.mark.parametrize("num", [1, 19, 4096, 989_989])
def test_a_captured_graph_sums_and_gathers_new_numbers(num: int, tmp_path: Path) -> None:
    with started(2, tmp_path) as ranks:
        group = joined(ranks, "cuda")
        payload = str(num).encode()
        mine, (answer,) = ranks.call_all("captured", payload, lambda: captured_sums(group, num))
        assert json.loads(answer) == mine
        for i, found in enumerate(mine):
            parts = [inputs(rank, i, num) for rank in range(2)]
            assert found == [*sum(parts).tolist(), *(part[0].item() for part in parts)]
        group.close()


def test_rank_0_does_not_wait_on_its_device_for_a_killed_rank(tmp_path: Path) -> None:
    with started(2, tmp_path) as ranks:
        group = joined(ranks, "cuda")
        threading.Timer(0.5, os.kill, (ranks.pids[0], signal.SIGKILL)).start()
        before = time.monotonic()
        with pytest.raises(RankFailed, match="rank 1 was killed by SIGKILL"):
            ranks.call_all("wait_for_ranks", b"1", group.barrier)
        assert time.monotonic() - before < 10
        group.close()


def test_ranks_on_gpus_listen_on_loopback_alone(tmp_path: Path) -> None:
    with started(2, tmp_path) as ranks:
        group = joined(ranks, "cuda")
        assert listening(os.getpid()) | listening(ranks.pids[0]) <= {"0100007F"}
        group.close()
