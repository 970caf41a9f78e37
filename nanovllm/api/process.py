"""The program of an API process (`python -m`): see `ApiProcesses`."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import socket
import sys
import threading
from typing import Any

import uvloop

from nanovllm import log
from nanovllm.api.config import ServerConfig
from nanovllm.api.prometheus import Latencies
from nanovllm.api.server import Stop, run
from nanovllm.api.service import Service
from nanovllm.api.start import DRAIN, ENDED, READY
from nanovllm.config import EngineConfig
from nanovllm.parallel.channel import ChannelClosed
from nanovllm.parallel.serve import Connection, connect
from nanovllm.serving.client import Client
from nanovllm.serving.interface import EngineDead


async def work(connection: Connection) -> int:
    """Serve until the other side says to end. Returns the exit code."""
    setup, index = connection.setup, connection.rank - 1
    server = ServerConfig(**setup["server"])
    for number, descriptor in enumerate(setup["clients"]):
        if number != index:
            os.close(descriptor)
    sock = socket.socket(fileno=setup["clients"][index])
    listener = socket.socket(fileno=setup["listener"])
    for one in (sock, listener):
        os.set_inheritable(one.fileno(), False)
    stop = Stop()
    engine = Client(
        EngineConfig(**setup["engine"]),
        sock,
        _memory(setup["counts"]),
        index=index,
        max_queued=server.max_queue_len,
    )
    threading.Thread(
        target=_listen, args=(connection, asyncio.get_running_loop(), stop), daemon=True
    ).start()
    try:
        await engine.ready()
    except (EngineDead, ValueError):
        return 1  # the process that has started the engine says why
    memory = memoryview(_memory(setup["latencies"]))
    size = Latencies.SIZE_BYTES
    parts = [memory[start : start + size] for start in range(0, memory.nbytes, size)]
    latencies = [Latencies(one) for one in parts]
    service = Service(engine, server, latencies, index)
    try:
        return await run(service, engine, listener, stop, lambda: connection.channel.send(READY))
    finally:
        await engine.close()


def _memory(descriptor: int) -> mmap.mmap:
    """The whole of a file as memory that processes share."""
    found = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    return found


def _listen(connection: Connection, loop: Any, stop: Stop) -> None:
    """Pass the wish to stop on. The end of the other side ends this process."""
    try:
        while True:
            name, _ = connection.channel.receive()
            loop.call_soon_threadsafe(lambda at_once: stop.ask(at_once=at_once), name != DRAIN)
    except (ChannelClosed, RuntimeError):
        os._exit(0)


def main() -> None:
    connection = connect(sys.argv[1:])
    log.configure()
    code = uvloop.run(work(connection))
    connection.channel.send(ENDED, json.dumps(code).encode())
    threading.Event().wait()  # `_listen` ends the process


if __name__ == "__main__":
    main()
