"""The loop of an engine process whose ranks fail. The engine makes its tokens up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nanovllm.engine.request import EngineRequest
from nanovllm.parallel.channel import Channel, channel_pair
from nanovllm.parallel.errors import RankFailed
from nanovllm.replicas import messages
from nanovllm.replicas.loop import Loop
from nanovllm.replicas.messages import Add
from tests.engines import greedy
from tests.serving.fake_engine import INFO, FakeEngine

LOST = "rank 1 was killed by SIGKILL"


class FailingEngine(FakeEngine):
    """Refuses requests. lose_rank: makes a rank fail, unless `is_silent`."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: Exception | None = None
        self.is_silent = False
        self._callback: Callable[[Exception], None] | None = None

    def lose_rank(self) -> None:
        self.failure = RankFailed(LOST)
        if not self.is_silent:
            assert self._callback is not None
            self._callback(self.failure)

    def check_ranks(self) -> None:
        if self.failure is not None:
            raise self.failure

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        self._callback = callback

    def add(self, asked: EngineRequest) -> int:
        raise RankFailed("ranks 1 … 3: OutOfMemoryError")

    def add_lora(self, request: object) -> bool:
        raise ValueError("it is torn")


class Process:
    """The loop in a thread. raised: what it has raised."""

    def __init__(self) -> None:
        self.engine = FailingEngine()
        control, theirs = channel_pair()
        self.channel = Channel(theirs)
        self.raised: list[Exception] = []
        self.thread = threading.Thread(target=self._run, args=(Loop(self._any, [], control),))
        self.thread.start()
        assert self.channel.receive()[0] == messages.READY

    @property
    def _any(self) -> Any:
        return self.engine

    def _run(self, loop: Loop) -> None:
        try:
            loop.run(INFO)
        except Exception as error:
            self.raised.append(error)

    def ask(self) -> None:
        fields = messages.packed_params(greedy(3), detokenizes=False)
        add = Add([0], [0], [5, 6], fields, True, 0, None)
        self.channel.send(messages.ADD, messages.dump(add))


@pytest.fixture
def process() -> Iterator[Process]:
    made = Process()
    yield made
    made.channel.close()
    made.thread.join(60)
    assert not made.thread.is_alive()


def assert_lost(process: Process) -> None:
    process.thread.join(60)
    assert [str(error) for error in process.raised] == [LOST]


def test_the_loss_of_a_rank_ends_a_loop_without_requests(process: Process) -> None:
    process.engine.lose_rank()
    assert_lost(process)


@pytest.mark.parametrize("name", [messages.ADD, messages.ADD_LORA])
def test_a_request_that_fails_with_a_rank_is_not_refused(process: Process, name: str) -> None:
    """It may come before the loop has been woken."""
    process.engine.is_silent = True
    process.engine.lose_rank()
    if name == messages.ADD:
        process.ask()
    else:
        lora = {"lora_name": "a", "lora_int_id": 1, "lora_path": "/a"}
        process.channel.send(name, messages.dump(lora))
    assert_lost(process)


def test_an_error_that_ranks_survive_refuses_one_request(process: Process) -> None:
    process.ask()
    name, payload = process.channel.receive()
    assert name == messages.OUTPUTS
    (row,) = messages.load_outputs(payload).rows
    assert row.done is not None and row.done.error == "RankFailed: ranks 1 … 3: OutOfMemoryError"
    process.channel.close()
    process.thread.join(60)
    assert [type(error).__name__ for error in process.raised] == ["ChannelClosed"]
