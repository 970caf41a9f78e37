"""The engine that makes tokens up keeps the contract of `AsyncEngine`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.sampling import SamplingParams
from nanovllm.serving.async_engine import AsyncEngine, Delta, Draining, EngineDead, QueueFull
from scripts.bench.mock_engine import MockEngine, MockOptions


def engine(**options: Any) -> MockEngine:
    made = MockEngine(EngineConfig("tiny-qwen3"), None, MockOptions(**options))
    as_contract: AsyncEngine = made
    assert as_contract is made
    return made


async def read(made: MockEngine, prompt: Any = "a prompt", **fields: Any) -> list[Delta]:
    return [one async for one in await made.open(prompt, SamplingParams(**fields))]


def text(deltas: list[Delta], index: int = 0) -> str:
    return "".join(one.text for one in deltas if one.output_index == index)


@pytest.mark.parametrize("num", [1, 19, 99])
@pytest.mark.parametrize("per_delta", [1, 7])
def test_answers_have_max_tokens_and_end_once(num: int, per_delta: int) -> None:
    deltas = asyncio.run(read(engine(tokens_per_delta=per_delta), max_tokens=num, n=3))
    for index in range(3):
        own = [one for one in deltas if one.output_index == index]
        assert sum(len(one.token_ids) for one in own) == num
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + ["length"]


def test_a_seed_gives_the_same_answer_in_parts_of_any_size() -> None:
    answers = [
        asyncio.run(read(engine(tokens_per_delta=size), max_tokens=19, seed=5)) for size in (1, 7)
    ]
    assert text(answers[0]) == text(answers[1])
    assert len(answers[0]) == 19 and len(answers[1]) == 3


def test_a_stop_string_ends_the_text_before_it() -> None:
    whole = text(asyncio.run(read(engine(), max_tokens=19, seed=5)))
    stop = whole[20:31]
    deltas = asyncio.run(read(engine(), max_tokens=19, seed=5, stop=["nowhere", stop]))
    assert text(deltas) == whole[: whole.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)


def test_a_rate_is_kept_and_a_late_reader_gets_larger_parts() -> None:
    async def late() -> list[Delta]:
        deltas = []
        async for one in await engine(tokens_per_s=200).open("a", SamplingParams(max_tokens=40)):
            deltas.append(one)
            await asyncio.sleep(0.05)
        return deltas

    start = time.monotonic()
    deltas = asyncio.run(late())
    assert time.monotonic() - start >= 0.2
    assert sum(len(one.token_ids) for one in deltas) == 40 and len(deltas) < 10


def test_what_is_not_taken_raises_and_leaves_nothing() -> None:
    async def work() -> None:
        made = engine(max_num_seqs=1, max_queue_len=1, max_model_len=19)
        for wrong in ("", [], [-1], [0] * 19):
            with pytest.raises(ValueError):
                await made.open(wrong)
        streams = [await made.open("a") for _ in range(2)]
        with pytest.raises(QueueFull):
            await made.open("a")
        for stream in streams:
            stream.abort()
            stream.abort()
        assert not made.streams and made.num_aborted == 2
        assert [one.finish_reason async for one in streams[0]] == ["abort"]
        made.fail("it is gone")
        with pytest.raises(EngineDead, match="gone"):
            await made.open("a")

    asyncio.run(work())


def test_draining_refuses_new_prompts_and_ends_the_others_in_time() -> None:
    async def work() -> None:
        for max_tokens, seconds, end in ((10, 600.0, "length"), (4000, 0.1, "abort")):
            made = engine(tokens_per_s=50)
            reading = asyncio.create_task(read(made, max_tokens=max_tokens))
            while not made.streams:
                await asyncio.sleep(0.001)
            draining = asyncio.create_task(made.drain(seconds))
            await asyncio.sleep(0)
            with pytest.raises(Draining):
                await made.open("a")
            assert (await reading)[-1].finish_reason == end
            await draining

    asyncio.run(work())


def test_it_needs_no_torch() -> None:
    code = "import sys, scripts.bench.mock_engine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
