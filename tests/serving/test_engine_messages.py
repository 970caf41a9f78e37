"""A client whose engine is the test: it sends the messages, so their order is certain."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from nanovllm.config import EngineConfig
from nanovllm.replicas import messages
from nanovllm.replicas.client_conn import ClientConn
from nanovllm.replicas.messages import Done, Outputs, RowTokens
from nanovllm.serving import admission
from nanovllm.serving.client import Client
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
