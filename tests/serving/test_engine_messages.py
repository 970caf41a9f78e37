"""A client whose engine is the test: it sends the messages, so their order is certain."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from nanovllm import LoRARequest
from nanovllm.config import EngineConfig
from nanovllm.outputs import RequestOutput
from nanovllm.replicas import messages
from nanovllm.replicas.client_conn import ClientConn
from nanovllm.replicas.messages import Done, Outputs, RowTokens
from nanovllm.serving import admission
from nanovllm.serving.async_engine import EngineDead
from nanovllm.serving.client import Client
from nanovllm.serving.encoding import Encoder
from tests.engines import greedy
from tests.serving.fake_engine import INFO
from tests.serving.served import run
from tests.serving.test_clients import collected

Result = TypeVar("Result")
CONFIG = EngineConfig.from_options("tiny-qwen3", {"device": "cpu"})
LENGTH = Done("length", None, 0, None, None)


class ByHand(ClientConn):
    """The engine's side of a client's connection."""

    def be_ready(self) -> None:
        self.send(messages.READY, messages.dump(INFO))

    def send_outputs(self, outputs: Outputs) -> None:
        self.send(messages.OUTPUTS, messages.dump(outputs))

    def asked(self) -> list[str]:
        """The names of the messages that the client has sent since the last call."""
        return [name for name, _ in self.read()]


def with_client(work: Callable[[Client, ByHand], Coroutine[Any, Any, Result]]) -> Result:
    async def work_and_close() -> Result:
        ours, theirs = socket.socketpair()
        engine = ByHand(theirs)
        client = Client(CONFIG, [ours], admission.own_counts())
        try:
            return await work(client, engine)
        finally:
            await client.close()
            engine.close()

    return run(work_and_close())


@pytest.mark.parametrize("in_row", [False, True])
def test_a_stop_string_and_the_end_of_the_answer_may_come_in_one_message(in_row: bool) -> None:
    """Where a step has several tokens, or a message those of several steps."""

    async def work(client: Client, engine: ByHand) -> None:
        engine.be_ready()
        stream = await client.open([5, 6], greedy(40, stop=["colour"]))
        assert client.tokenizer is not None
        tokens = client.tokenizer.encode("a colour")
        rows = [RowTokens(0, [7], None, LENGTH)]
        if in_row:
            rows.insert(0, RowTokens(0, tokens))
            engine.send_outputs(Outputs([], [], rows))
        else:
            engine.send_outputs(Outputs([0] * len(tokens), tokens, rows))
        parts = await collected(stream)
        assert (parts[-1].finish_reason, parts[-1].stop_reason) == ("stop", "colour")
        later = await client.open([5], greedy(1))
        assert engine.asked() == [messages.ADD] * 2
        engine.send_outputs(Outputs([], [], [RowTokens(1, [8], None, LENGTH)]))
        assert (await collected(later))[-1].token_ids == [8]

    with_client(work)


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_request_can_be_aborted_before_it_is_sent(
    is_ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model loads, or while its prompt is encoded."""
    goes_on = asyncio.Event()
    encode = Encoder.encode

    async def wait_and_encode(*args: Any) -> Any:
        await goes_on.wait()
        return await encode(*args)

    async def work(client: Client, engine: ByHand) -> None:
        if is_ready:
            engine.be_ready()
            await client.ready()
            monkeypatch.setattr(Encoder, "encode", wait_and_encode)
        opening = asyncio.ensure_future(client.open([5, 6], greedy(3, n=2), request_id="name"))
        reading = asyncio.ensure_future(_outputs(client, "other"))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="request_id is 'name': it must be text and not in"):
            await client.open([5], greedy(1), request_id="name")
        client.abort("name")
        client.abort("other")
        goes_on.set()
        if not is_ready:
            engine.be_ready()
        stream = await opening
        later = await client.open([5], greedy(1), request_id="name")
        for parts in (await collected(stream), (await reading)[-1].outputs):
            assert {part.finish_reason for part in parts} == {"abort"}
        assert engine.asked() == [messages.ADD], "only the later one is sent, and not aborted"
        assert client._quota.num_all == 1
        later.abort()

    with_client(work)


async def _outputs(client: Client, name: str) -> list[RequestOutput]:
    return [one async for one in client.generate([5], greedy(3), name)]


def test_closing_ends_all_that_tasks_wait_for() -> None:
    """They end with EngineDead, not with CancelledError: no caller has cancelled them."""

    async def work(client: Client, engine: ByHand) -> None:
        await _closed(client, [client.ready(), client.open([5]), client.metrics()])
        await _closed(client, [client.ready()])

    with_client(work)


@pytest.mark.parametrize("num_turns", [1, 5])
def test_closing_ends_questions_to_the_engine(num_turns: int) -> None:
    """Those that are sent, and those that are about to be."""

    async def work(client: Client, engine: ByHand) -> None:
        engine.be_ready()
        await client.ready()
        client.config = replace(client.config, enable_lora=True)
        adapter = LoRARequest("a", 1, "/a")
        asks: list[Any] = [client.metrics(), client.add_lora(adapter), client.remove_lora(1)]
        await _closed(client, asks, num_turns)

    with_client(work)


async def _closed(
    client: Client, waiting: list[Coroutine[Any, Any, Any]], num_turns: int = 1
) -> None:
    """Close the client while tasks wait."""
    tasks = [asyncio.ensure_future(one) for one in waiting]
    for _ in range(num_turns):
        await asyncio.sleep(0)
    await client.close()
    for task in tasks:
        with pytest.raises(EngineDead, match="the engine is closed"):
            await asyncio.wait_for(task, 10)
