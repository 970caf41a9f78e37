"""An engine in a process of its own: start, failure and end, under asyncio and uvloop."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nanovllm
from nanovllm import LLM, AsyncLLM
from nanovllm.parallel import rank_handle
from nanovllm.parallel.rank_handle import RankProcess
from nanovllm.serving.async_engine import EngineDead, Unavailable
from nanovllm.serving.stream import OpenStream
from tests.engines import greedy
from tests.replicas.local_replicas import children
from tests.serving.served import LOOPS, run
from tests.serving.test_clients import answers, collected, comparable, until_idle

MODEL = "tiny-qwen3"
SIZES: dict[str, Any] = {
    "device": "cpu", "enforce_eager": True, "max_num_seqs": 4, "max_model_len": 128,
    "num_kvcache_blocks": 65,
}  # fmt: skip
PARAMS = greedy(12, n=2, stop=["\n"])
PROMPTS: list[Any] = ["How are you?", "17 + 4 =", [5, 6, 7], "Name a colour."]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for temporary files. Afterwards nothing is in it, and no process is left."""
    before = children()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert children() == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    llm = LLM(MODEL, **SIZES)
    found = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    llm.close()
    return found


def test_answers_are_those_of_llm_under_uvloop(
    expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nanovllm.AsyncLLM is AsyncLLM
    init = RankProcess.__init__

    def stopped(process: RankProcess, *given: Any, **options: Any) -> None:
        init(process, *given, **options)
        os.kill(process.pid, signal.SIGSTOP)

    monkeypatch.setattr(RankProcess, "__init__", stopped)
    llm = AsyncLLM(MODEL, **SIZES)  # it waits for nothing: else this would last for ever

    async def let_it_load() -> None:
        """The loop goes on while the model does not."""
        for _ in range(10):
            await asyncio.sleep(0.01)
        os.kill(llm._process.pid, signal.SIGCONT)

    async def work() -> list[Any]:
        going_on = asyncio.ensure_future(let_it_load())
        async with llm:
            await going_on
            return await answers(llm, PROMPTS, PARAMS)

    for ours, theirs in zip(run(work(), "uvloop"), expected, strict=True):
        assert comparable(ours[-1]) == comparable(theirs)
    with pytest.raises(RuntimeError, match="belongs to another event loop"):
        run(llm.ready())


def test_a_killed_engine_fails_all_requests(expected: list[Any]) -> None:
    async def fails_what_has_begun() -> bool:
        """On a busy machine an answer that has begun may have ended before the engine stops."""
        async with AsyncLLM(MODEL, **SIZES) as llm:
            for ours, theirs in zip(await answers(llm, PROMPTS, PARAMS), expected, strict=True):
                assert comparable(ours[-1]) == comparable(theirs)
            first = await llm.open([5, 6], greedy(120))
            await first.take()
            os.kill(llm._process.pid, signal.SIGSTOP)  # so that none of the others ends
            streams = [await llm.open([5, 6], greedy(120)) for _ in range(6)]
            os.kill(llm._process.pid, signal.SIGKILL)
            message = "^the engine process was killed by SIGKILL$"
            for stream in streams:
                with pytest.raises(EngineDead, match=message):
                    await asyncio.wait_for(collected(stream), 60)
            with pytest.raises(EngineDead, match=message):
                await llm.open([5], greedy(1))
            with pytest.raises(EngineDead, match=message):
                await llm.metrics()
            assert isinstance(llm.failure, EngineDead)
            assert await llm.drain()
            try:
                await collected(first)
            except EngineDead:
                return True
            return False

    assert any(run(fails_what_has_begun()) for _ in range(5))


def test_wrong_options_are_refused_and_leave_nothing() -> None:
    with pytest.raises(TypeError, match="unknown option max_num_sequences"):
        AsyncLLM(MODEL, max_num_sequences=3)
    with pytest.raises(ValueError, match="max_queued is -1: it must be a whole number"):
        AsyncLLM(MODEL, max_queued=-1)
    with pytest.raises(ValueError, match=r"^attention_backend"):
        run(AsyncLLM.start(MODEL, **SIZES, attention_backend="triton"))


def test_an_engine_that_is_never_awaited_can_be_closed() -> None:
    run(AsyncLLM(MODEL, **SIZES).close())


def test_replicas_give_the_same_answers(expected: list[Any]) -> None:
    async def work() -> list[Any]:
        async with AsyncLLM(MODEL, **SIZES, data_parallel_size=2) as llm:
            assert llm.max_num_seqs == 8
            found = await answers(llm, PROMPTS, PARAMS)
            params = greedy(12, stop=["\n"], prompt_logprobs=1)
            parts = await collected(await llm.open("a", params))
            assert parts[-1].prompt_logprobs is not None
            stream = await llm.open("a", greedy(100))
            await stream.take()
            stream.abort()
            await until_idle(llm)
            return found

    for ours, theirs in zip(run(work()), expected, strict=True):
        assert comparable(ours[-1]) == comparable(theirs)


def _replicas(llm: AsyncLLM) -> set[int]:
    return children(llm._process.pid)


async def _until(is_true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 90
    while not is_true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def test_killed_replicas_are_started_again(
    expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First one of them, then both: answers that a killed one has begun end with an error, others
    are begun by the other one, and while none is there a request is refused."""
    monkeypatch.setattr(rank_handle, "SILENT_SECONDS", 1000.0)  # of their parent

    async def has_lost_answers(llm: AsyncLLM) -> bool:
        """Kill a replica. On a busy machine it may have ended all of its answers before."""
        killed = min(_replicas(llm))
        streams = [await llm.open("a", greedy(100)) for _ in range(4)]
        parts = [await stream.take() for stream in streams]
        os.kill(killed, signal.SIGSTOP)
        later = [await llm.open(one, PARAMS) for one in PROMPTS]
        os.kill(killed, signal.SIGKILL)
        ends = [(found + await collected(one))[-1] for found, one in zip(parts, streams)]
        reasons = [one.finish_reason for one in ends]
        assert set(reasons) <= {"error", "length"} and reasons.count("length") >= 2
        assert {one.error for one in ends if one.error} <= {
            f"replica {index} has ended: see the log" for index in range(2)
        }
        assert [await _token_ids(stream) for stream in later] == [
            [answer.token_ids for answer in theirs.outputs] for theirs in expected
        ]
        await _until(lambda: not any(one.is_lost for one in llm._engines))
        assert len(_replicas(llm)) == 2 and killed not in _replicas(llm)
        return "error" in reasons

    async def work() -> list[Any]:
        async with AsyncLLM(MODEL, **SIZES, data_parallel_size=2) as llm:
            for _ in range(5):
                if await has_lost_answers(llm):
                    break
            else:
                raise AssertionError("a replica is never killed before its answers end")
            num_tokens = await _count(llm, "generation_tokens")
            await answers(llm, PROMPTS, PARAMS)
            assert await _count(llm, "generation_tokens") > num_tokens >= 200
            os.kill(llm._process.pid, signal.SIGSTOP)  # so that it does not start them yet
            for pid in _replicas(llm):
                os.kill(pid, signal.SIGKILL)
            await _until(lambda: all(one.is_lost for one in llm._engines))
            with pytest.raises(Unavailable, match="all replicas are being started again"):
                await llm.open("a", PARAMS)
            os.kill(llm._process.pid, signal.SIGCONT)
            await _until(lambda: not any(one.is_lost for one in llm._engines))
            await until_idle(llm)
            return await answers(llm, PROMPTS, PARAMS)

    for ours, theirs in zip(run(work()), expected, strict=True):
        assert comparable(ours[-1]) == comparable(theirs)


async def _token_ids(stream: OpenStream) -> list[list[int]]:
    """Those of each answer. None ends with an error."""
    parts = await collected(stream)
    assert not any(part.error for part in parts)
    return [
        [one for part in parts if part.output_index == index for one in part.token_ids]
        for index in range(max(part.output_index for part in parts) + 1)
    ]


async def _count(llm: AsyncLLM, name: str) -> float:
    return sum(one.value for one in await llm.metrics() if one.name == f"nanovllm:{name}")


# the end, and where it is asked for ---------------------------------------------------------------


async def _one_answer(llm: AsyncLLM) -> list[Any]:
    return await answers(llm, PROMPTS[:1], greedy(2))


def _loop_in_a_thread(llm: AsyncLLM, name: str) -> asyncio.AbstractEventLoop:
    """A running loop in which the engine has answered."""
    loop = LOOPS[name]()

    def work() -> None:
        loop.run_forever()
        loop.close()

    threading.Thread(target=work).start()
    asyncio.run_coroutine_threadsafe(_one_answer(llm), loop).result(120)
    return loop


@pytest.mark.parametrize("name", LOOPS)
def test_an_engine_is_closed_after_its_loop_in_another_one(name: str) -> None:
    llm = AsyncLLM(MODEL, **SIZES)
    run(_one_answer(llm), name)
    run(llm.close(), name)
    run(llm.close(), name)
    llm.shutdown()


@pytest.mark.parametrize("name", LOOPS)
def test_an_engine_is_closed_in_another_thread_than_its_loop_runs_in(name: str) -> None:
    llm = AsyncLLM(MODEL, **SIZES)
    loop = _loop_in_a_thread(llm, name)
    stream = asyncio.run_coroutine_threadsafe(llm.open([5], greedy(120)), loop).result(60)
    rest = asyncio.run_coroutine_threadsafe(collected(stream), loop)
    run(llm.close(), name)
    assert rest.result(60), "its reader gets the end of its answer"
    loop.call_soon_threadsafe(loop.stop)
    while not loop.is_closed():
        time.sleep(0.01)


def test_a_stopped_loop_does_not_keep_an_engine_from_its_end() -> None:
    llm = AsyncLLM(MODEL, **SIZES)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_one_answer(llm))
    llm.shutdown()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.mark.parametrize("is_loop_closed", [True, False])
def test_the_end_of_the_last_reference_ends_the_process(is_loop_closed: bool) -> None:
    before = children()
    loop = asyncio.new_event_loop()
    llm = AsyncLLM(MODEL, **SIZES)
    loop.run_until_complete(_one_answer(llm))
    assert children() > before
    if is_loop_closed:
        loop.close()
    del llm
    gc.collect()
    assert children() == before
    loop.close()
