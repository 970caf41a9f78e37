"""The program of an API process (`python -m`): it runs a function that serves clients.

The function is named "package.module:function" and called with an `ApiProcess`, in the main thread:

    def run(process: ApiProcess) -> None: ...

It creates the engine's client with `process.client()` in its event loop and accepts connections on
`process.listener`, which all API processes share. Once `process.drain_begins` is done, it refuses
new requests, finishes the running ones (`Client.drain(process.drain_timeout)`) and returns. It
installs no signal handlers: only the supervisor gets signals. The process ends after the function
has returned and the supervisor has closed the channel, or at once if the supervisor dies or kills
it. If the function returns early or raises an error, the whole server ends; the supervisor raises a
ValueError, which is about options.
"""

from __future__ import annotations

import asyncio
import importlib
import mmap
import os
import socket
import threading
from concurrent.futures import Future
from typing import Any

from nanovllm import programs
from nanovllm.config import EngineConfig
from nanovllm.parallel.channel import Channel, ChannelClosed
from nanovllm.replicas import engine_program
from nanovllm.serving import admission
from nanovllm.serving.client import Client
from nanovllm.serving.supervisor import DONE, DRAIN


class ApiProcess:
    """The arguments of an API process.

    options: from the supervisor, JSON. index: of this process among `num`. listener: a listening
    socket. memory: shared by all API processes, `shared_bytes` of the supervisor's `Service`.
    drain_timeout: the seconds that running requests get once draining begins.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self.options: dict[str, Any] = setup["options"]
        self.index: int = setup["index"]
        self.num: int = setup["num"]
        self.drain_timeout: float = setup["drain_timeout"]
        self.config = EngineConfig(**setup["engine"])
        for descriptor in [*setup["inherited"].values(), *setup["engines"]]:
            os.set_inheritable(descriptor, False)
        self.listener = socket.socket(fileno=setup["inherited"]["listener"])
        self._engines = [socket.socket(fileno=descriptor) for descriptor in setup["engines"]]
        self._counts = admission.inherited_counts(setup["inherited"]["counts"])
        memory = setup["inherited"]["memory"]
        shared = mmap.mmap(memory, 0) if os.fstat(memory).st_size else b""
        self.memory = memoryview(shared)
        self._max_queued: int = setup["max_queued"]
        self._draining: Future[None] = Future()

    def client(self) -> Client:
        """The engine's client; call this once. `await client.ready()` waits for a warm engine."""
        return Client(
            self.config, self._engines, self._counts, index=self.index, max_queued=self._max_queued
        )

    async def drain_begins(self) -> None:
        """Wait until the server is asked to shut down. May be awaited many times."""
        await asyncio.shield(asyncio.wrap_future(self._draining))

    def begin_drain(self) -> None:
        if not self._draining.done():
            self._draining.set_result(None)


def serve(setup: dict[str, Any], channel: Channel) -> None:
    """Call the target function. Raises its errors and ChannelClosed."""
    engine_program = ApiProcess(setup)
    listening = threading.Thread(
        target=_listen, args=(channel, engine_program), name="supervisor", daemon=True
    )
    listening.start()
    programs.find_again(setup["folder"])
    module, _, name = setup["target"].partition(":")
    getattr(importlib.import_module(module), name)(engine_program)
    channel.send(DONE)
    listening.join()  # this ends the process


def _listen(channel: Channel, engine_program: ApiProcess) -> None:
    """Handle the supervisor's messages; exit when the channel closes."""
    try:
        while channel.receive()[0] == DRAIN:
            engine_program.begin_drain()
    except ChannelClosed:
        os._exit(0)


if __name__ == "__main__":
    engine_program.run(serve)
