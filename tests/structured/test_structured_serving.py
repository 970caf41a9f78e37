"""Structured output through an engine in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.engine import Engine
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.parallel.channel import Channel, channel_pair
from nanovllm.replicas import loop, messages
from nanovllm.serving.async_engine import EngineDead
from nanovllm.serving.async_llm import AsyncLLM
from nanovllm.serving.client import Client
from tests.engines import greedy
from tests.replicas import local_replicas
from tests.serving import served
from tests.serving.test_clients import collected

CODE = "[0-9]{3}-[a-f]{2}"


def trials(parent: int) -> set[Path]:
    """The processes that try grammars for a process."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, state = (path / "cmdline").read_bytes(), (path / "stat").read_text()
        except OSError:
            continue  # it has ended
        if b"nanovllm.structured.grammar_sandbox_program" in words and state.rsplit(")")[1].split()[
            1
        ] == str(parent):
            found.add(path)
    return found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_an_engine_that_is_killed_leaves_no_compiler_behind() -> None:
    left: set[Path] = set()

    async def text(llm: AsyncLLM, given: dict[str, Any]) -> str:
        params = SamplingParams(max_tokens=12, seed=1, structured_outputs=given)  # type: ignore[arg-type]
        stream = await llm.open("What is 2 + 3?", params)
        return "".join([one.text async for one in stream])

    async def work() -> None:
        llm = AsyncLLM(
            "tiny-qwen3", device="cpu", enforce_eager=True, max_num_seqs=2, max_model_len=64
        )
        async with llm:
            assert re.fullmatch(CODE, await text(llm, {"regex": CODE}))
            with pytest.raises(ValueError, match=r"structured_outputs.json: .* 'not' at #"):
                await text(llm, {"json": {"not": {}}})
            with pytest.raises(ValueError, match="at most 262144 are allowed"):
                await text(llm, {"regex": "a" * 300_000})
            left.update(trials(llm._process.pid))
            assert left
            os.kill(llm._process.pid, signal.SIGKILL)
            with pytest.raises(EngineDead):
                await text(llm, {"choice": ["a"]})

    asyncio.run(work())
    deadline = time.monotonic() + 60
    while any(one.exists() for one in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [one for one in left if one.exists()]


@pytest.fixture
def engine() -> Iterator[Engine]:
    llm = LLM("tiny-qwen3", device="cpu", enforce_eager=True, max_num_seqs=2, max_model_len=256)
    yield llm.engine
    llm.close()


def is_prepared(engine: Engine) -> bool:
    return engine._grammars._compiler._of_library is not None  # type: ignore[union-attr]


def test_an_engine_prepares_for_grammars_as_soon_as_it_is_idle(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_running: list[int] = []
    monkeypatch.setattr(loop, "IDLE_SECONDS", 1000.0)
    prepare = engine.prepare_grammars

    def noted() -> None:
        num_running.append(len(engine._answers.requests))
        prepare()

    monkeypatch.setattr(engine, "prepare_grammars", noted)

    async def work(client: Client) -> None:
        for _ in range(2):
            stream = await client.open([5, 6], greedy(200))
            assert len(await collected(stream)) > 1
            assert not num_running, "a request that comes before does not wait for it"
        monkeypatch.setattr(loop, "IDLE_SECONDS", 0.05)
        await collected(await client.open([5, 6], greedy(200)))
        deadline = time.monotonic() + 60
        while not is_prepared(engine) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert is_prepared(engine)
        await collected(await client.open([5, 6], greedy(2)))

    served.serve(engine, work)
    assert num_running == [0]


@pytest.mark.parametrize("given", [{"structured_outputs": {"regex": CODE}}, {"bad_words": ["a b"]}])
def test_answers_and_prompts_with_the_same_parameters_share_what_takes_long(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """A grammar of 256 kB or a thousand bad words take some 50 ms, in the loop of the engine and in
    the event loop, where no other request gets on meanwhile."""
    found: list[str] = []
    for name in ("source", "edits"):
        plain = getattr(InputProcessor, name)

        def noted(self: Any, params: SamplingParams, name: str = name, plain: Any = plain) -> Any:
            found.append(name)
            return plain(self, params)

        monkeypatch.setattr(InputProcessor, name, noted)

    async def work(client: Client) -> list[list[str]]:
        params = SamplingParams(max_tokens=8, seed=1, n=3, **given)
        streams = [await client.open([5, 6, one], params) for one in range(7, 10)]
        same = SamplingParams(max_tokens=8, seed=1, n=2, **given)
        await collected(await client.open([5, 6], same))
        texts = []
        for stream in streams:
            parts = await collected(stream)
            of_answers = [[one.text for one in parts if one.output_index == i] for i in range(3)]
            texts.append(["".join(one) for one in of_answers])
        return texts

    texts = served.serve(engine, work)
    if "structured_outputs" in given:
        assert all(re.fullmatch(CODE, text) for one in texts for text in one)
    # the engine once; the client once for each of the two objects
    assert found.count("source") == found.count("edits") == 3


def test_replicas_prepare_for_grammars_when_they_are_told(engine: Engine) -> None:
    ours, theirs = channel_pair()
    thread = threading.Thread(target=local_replicas.run, args=(engine, Channel(theirs)))
    thread.start()
    assert ours.receive()[0] == messages.READY
    ours.send(messages.PREPARE_GRAMMARS)
    deadline = time.monotonic() + 60
    while not is_prepared(engine) and time.monotonic() < deadline:
        time.sleep(0.01)
    ours.close()
    thread.join()
    assert is_prepared(engine)
