"""Engines of two replicas on this machine, their processes, and one engine alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.parallel.channel import Channel, ChannelClosed
from nanovllm.replicas.loop import Loop
from tests.conftest import save_tiny
from tests.engines import random_prompts, save_tokenizer

SIZES = {
    "device": "cpu",
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 129,
}
PROMPTS = random_prompts([1, 19, 70, 33, 7, 48])


def make(folder: Path, size: int, **options: Any) -> LLM:
    return LLM(str(folder), data_parallel_size=size, **{**SIZES, **options})


def pids(llm: LLM) -> list[int]:
    engine: Any = llm.engine
    return [replica.pid for replica in engine.replicas]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(parent: int | None = None) -> set[int]:
    """The processes that this one, or another, has started and that still run."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, started_by = path.read_text().rsplit(")", 1)[1].split()[:2]
            if int(started_by) == (parent or os.getpid()) and state != "Z":
                found.add(int(path.parent.name))
    return found


def count(llm: LLM, name: str) -> float:
    return next(one.value for one in llm.get_metrics() if one.name == f"nanovllm:{name}")


def counts(llm: LLM, name: str) -> list[float]:
    """The same for each replica."""
    engine: Any = llm.engine
    found = [replica.read_metrics() for replica in engine.replicas]
    return [next(m.value for m in metrics if m.name == f"nanovllm:{name}") for metrics in found]


def note(engine: Any, found: dict[int, list[int]], ends: dict[int, Any]) -> None:
    """Take what has come: the tokens of each request, and its end."""
    engine.advance()
    for one in engine.take():
        assert one.request_id not in ends, "nothing follows the end"
        found[one.request_id] += one.token_ids
        if one.completion is not None:
            ends[one.request_id] = one.completion


def wait_until_gone(gone: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_alive, gone)):
        assert time.monotonic() < deadline, f"of {gone} some run"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[LLM]:
    llm = make(folder, 1)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[LLM]:
    llm = make(folder, 2)
    yield llm
    llm.close()


def run(engine: Any, channel: Channel) -> None:
    with suppress(ChannelClosed):
        Loop(engine, [], channel).run(engine.info)
