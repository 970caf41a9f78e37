"""An engine on two ranks that loses one of them at load: its requests end, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nanovllm import AsyncLLM
from nanovllm.serving.async_engine import EngineDead
from tests.engines import greedy
from tests.replicas.local_replicas import children, wait_until_gone
from tests.serving.served import run
from tests.serving.test_async_llm import MODEL, SIZES
from tests.serving.test_clients import collected

MESSAGES = {
    0: "^the engine process was killed by SIGKILL$",
    1: "^the engine process: rank 1 was killed by SIGKILL$",
}


@pytest.mark.parametrize("lost", MESSAGES)
def test_the_loss_of_a_rank_at_load_ends_its_requests_and_all_processes(
    lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four requests run and two wait. Rank 0 is in the engine's process, and rank 1 its child."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def work() -> list[int]:
        async with AsyncLLM(MODEL, **SIZES, tensor_parallel_size=2) as llm:
            ranks = [llm._process.pid, *children(llm._process.pid)]
            streams: list[Any] = [await llm.open([5, 6], greedy(120)) for _ in range(6)]
            for stream in streams[:4]:
                await stream.take()
            os.kill(ranks[lost], signal.SIGKILL)
            for stream in streams:
                with pytest.raises(EngineDead, match=MESSAGES[lost]):
                    await asyncio.wait_for(collected(stream), 30)
            with pytest.raises(EngineDead, match=MESSAGES[lost]):
                await llm.open([5], greedy(1))
            return ranks

    _assert_gone(run(work()), tmp_path)


def test_the_loss_of_a_rank_ends_an_engine_without_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: else it would refuse requests, and look alive."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def work() -> list[int]:
        async with AsyncLLM(MODEL, **SIZES, tensor_parallel_size=2) as llm:
            await collected(await llm.open([5, 6], greedy(2)))
            ranks = [llm._process.pid, *children(llm._process.pid)]
            os.kill(ranks[1], signal.SIGKILL)
            while llm.failure is None:
                await asyncio.sleep(0.01)
            with pytest.raises(EngineDead, match=MESSAGES[1]):
                await llm.open([5], greedy(1))
            return ranks

    _assert_gone(run(work()), tmp_path)


def _assert_gone(ranks: list[int], tmp_path: Path) -> None:
    assert len(ranks) == 2
    wait_until_gone(ranks)
    assert list(tmp_path.iterdir()) == []
