"""An engine belongs to the process that has loaded it: a fork of it gets an error and cannot
disturb it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from nanovllm import LLM, EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.serving import admission
from nanovllm.serving.client import Client
from tests.engines import greedy, tokens


def in_fork(*uses: Callable[[], object]) -> list[str]:
    """What the uses raise in a fork of this process, one after another."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(60)  # a use may wait for ever
            for use in uses:
                try:
                    text = f"returned {use()}"
                except BaseException as error:
                    text = f"{type(error).__name__}: {error}"
                os.write(write, f"{text}\n".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as lines:
        said = lines.read().splitlines()
    os.waitpid(pid, 0)
    return said


@pytest.fixture
def llm(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    with closing(make_llm()) as llm:
        yield llm


def test_every_use_in_a_fork_is_refused_and_the_engine_goes_on(llm: LLM) -> None:
    expected = tokens(llm, [[5, 6, 7]], greedy())
    engine = llm.engine
    assert isinstance(engine, Engine)
    stream = llm.stream([[5, 6, 7]], greedy())
    next(stream)
    said = in_fork(
        lambda: llm.generate([[5]], use_tqdm=False),
        lambda: next(llm.stream([[5]])),
        lambda: next(stream),
        lambda: engine.add_request([5]),
        engine.step,
        llm.close,
    )
    for text in said:
        assert text.startswith(f"RuntimeError: this engine was loaded in process {os.getpid()}")
    assert len(said) == 6
    assert in_fork(engine.close, engine.__del__, stream.close) == ["returned None"] * 3
    stream.close()
    assert tokens(llm, [[5, 6, 7]], greedy()) == expected


def test_a_client_is_refused_in_a_fork_and_sends_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = Client(EngineConfig("some/model"), [ours], admission.own_counts())
        said = in_fork(
            lambda: asyncio.run(client.ready()), lambda: asyncio.run(anext(client.generate([5])))
        )
        assert [text.partition(" in process")[0] for text in said] == [
            "RuntimeError: this engine was loaded"
        ] * 2
        assert in_fork(lambda: asyncio.run(client.close())) == ["returned None"]
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
