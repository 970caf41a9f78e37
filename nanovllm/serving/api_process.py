"""The program of an API process (`python -m`): it lets a function serve clients of its own.

The function is named "package.module:function" and called with an `ApiProcess`, in the main thread:

    def run(process: ApiProcess) -> None: ...

It makes the engine's client with `process.client()` in its event loop and accepts connections at
`process.listener`, which all API processes share. Once `process.drain_begins` is done it accepts no
more requests, finishes what runs (`Client.drain(process.drain_timeout)`) and returns. It installs
no signal handlers: only the supervisor gets signals. The process ends when the function has
returned and the supervisor closes the channel, or as soon as the supervisor ends or wants an end at
once. If the function returns before it is told to, or raises an error, the whole server ends;
a ValueError is about options, and the supervisor raises it.
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
from nanovllm.replicas import process
from nanovllm.serving import quota
from nanovllm.serving.client import Client
from nanovllm.serving.supervisor import DONE, DRAIN


class ApiProcess:
    """What an API process is given.

    options: what the supervisor was given for it, JSON. index: of this process among `num`.
    listener: a listening socket. memory: what all API processes share, `shared_bytes` of the
    supervisor's `Service`. drain_timeout: the seconds that requests have once draining has
    begun.
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
        self._counts = quota.inherited_counts(setup["inherited"]["counts"])
        memory = setup["inherited"]["memory"]
        shared = mmap.mmap(memory, 0) if os.fstat(memory).st_size else b""
        self.memory = memoryview(shared)
        self._max_queued: int = setup["max_queued"]
        self._draining: Future[None] = Future()

    def client(self) -> Client:
        """The engine's client; call it once. `await client.ready()` waits for a warm engine."""
        return Client(
            self.config, self._engines, self._counts, index=self.index, max_queued=self._max_queued
        )

    async def drain_begins(self) -> None:
        """Wait until the server is told to end. May be awaited many times."""
        await asyncio.shield(asyncio.wrap_future(self._draining))

    def begin_drain(self) -> None:
        if not self._draining.done():
            self._draining.set_result(None)


def serve(setup: dict[str, Any], channel: Channel) -> None:
    """Call the function. Raises its errors and ChannelClosed."""
    process = ApiProcess(setup)
    listening = threading.Thread(
        target=_listen, args=(channel, process), name="supervisor", daemon=True
    )
    listening.start()
    programs.find_again(setup["folder"])
    module, _, name = setup["target"].partition(":")
    getattr(importlib.import_module(module), name)(process)
    channel.send(DONE)
    listening.join()  # it ends the process


def _listen(channel: Channel, process: ApiProcess) -> None:
    """Take the supervisor's messages; end this process with the channel."""
    try:
        while channel.receive()[0] == DRAIN:
            process.begin_drain()
    except ChannelClosed:
        os._exit(0)


if __name__ == "__main__":
    process.run(serve)
