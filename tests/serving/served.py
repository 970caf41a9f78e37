"""An engine of the test's process behind its loop, in a thread, with clients in an event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import uvloop

from nanovllm.engine.engine import Engine
from nanovllm.parallel.channel import ChannelClosed, channel_pair
from nanovllm.pooling.engine import PoolingEngine
from nanovllm.replicas.client_conn import ClientConn
from nanovllm.replicas.handshake import digest_of
from nanovllm.replicas.loop import Loop
from nanovllm.serving import admission
from nanovllm.serving.client import Client

Result = TypeVar("Result")
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def run(work: Coroutine[Any, Any, Result], loop: str = "asyncio") -> Result:
    """The result of a coroutine in a new event loop, which must end in time."""
    events = LOOPS[loop]()
    try:
        return events.run_until_complete(asyncio.wait_for(work, 300))
    finally:
        events.run_until_complete(events.shutdown_asyncgens())
        events.close()


def serve(
    engine: Engine | PoolingEngine,
    work: Callable[..., Coroutine[Any, Any, Result]],
    num_clients: int = 1,
    *,
    loop: str = "asyncio",
    in_step: bool = False,
    **options: Any,
) -> Result:
    """The result of `work(client, …)` with clients of an engine; `options` are those of `Client`.

    in_step: the engine makes a step only when the event loop has had a turn. Else, where the loop's
    thread does not run for a while, even a long answer may end meanwhile.

    Afterwards the engine has no requests.
    """
    with admission.new_file(num_clients) as descriptor:
        counts = admission.inherited_counts(descriptor)
    pairs = [socket.socketpair() for _ in range(num_clients)]
    control, theirs = channel_pair()
    thread = threading.Thread(target=_run_loop, args=(engine, [one for _, one in pairs], control))
    thread.start()

    async def work_and_close() -> Result:
        clients = [
            Client(engine.config, [ours], counts, index=index, **options)
            for index, (ours, _) in enumerate(pairs)
        ]
        ticking = asyncio.ensure_future(turns.tick()) if turns else None
        try:
            return await work(*clients)
        finally:
            for client in clients:
                await client.close()
            if ticking is not None:
                ticking.cancel()

    turns = Turns(engine) if in_step else None
    try:
        return run(work_and_close(), loop)
    finally:
        if turns is not None:
            turns.end()
        theirs.close()
        thread.join()
        engine.abort_all(
            list(engine._answers.requests if isinstance(engine, Engine) else engine._requests)
        )
        engine.take()


class Turns:
    """Lets an engine make a step after each turn of an event loop."""

    def __init__(self, engine: Engine | PoolingEngine) -> None:
        self._engine, self._turn, self._is_over = engine, threading.Event(), False
        advance = engine.advance

        def after_a_turn() -> Any:
            assert self._turn.wait(60)
            if not self._is_over:
                self._turn.clear()
            return advance()

        setattr(engine, "advance", after_a_turn)  # noqa: B010

    async def tick(self) -> None:
        while True:
            self._turn.set()
            await asyncio.sleep(0.001)

    def end(self) -> None:
        self._is_over = True
        self._turn.set()
        delattr(self._engine, "advance")


def _run_loop(engine: Engine | PoolingEngine, socks: list[socket.socket], control: Any) -> None:
    engine.enter_thread()
    with suppress(ChannelClosed):
        info = replace(engine.info, checkpoint=digest_of(engine.config))
        Loop(engine, [ClientConn(sock) for sock in socks], control).run(info)
