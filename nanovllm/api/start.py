"""Starts a server: the engine's process and the processes that speak HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields
from typing import Any

import uvloop

from nanovllm import log
from nanovllm.api.config import ServerConfig
from nanovllm.api.prometheus import Latencies
from nanovllm.api.server import Stop, bind, run, url_of
from nanovllm.api.service import Service
from nanovllm.config import EngineConfig
from nanovllm.parallel.ranks import Ranks
from nanovllm.parallel.watch import RankFailed
from nanovllm.replicas import setups
from nanovllm.serving.async_llm import AsyncLLM
from nanovllm.serving.engine_process import EngineProcess

logger = logging.getLogger(__name__)
PROGRAM = "nanovllm.api.process"
NUMBER_BYTES = 8  # of the number of requests of a client, in shared memory
# messages of API processes, and those to them
READY, ENDED = "ready", "ended"
DRAIN, END_NOW = "drain", "end"


def serve(
    engine: EngineConfig, server: ServerConfig, on_ready: Callable[[str], object] | None
) -> int:
    """See `nanovllm.api.serve`."""
    log.configure()
    with bind(server) as sock:
        url = url_of(server, sock)

        def ready() -> None:
            logger.info("%s is served at %s", server.model_names(engine.model)[0], url)
            if on_ready is not None:
                on_ready(url)

        several = server.api_processes > 1
        work = _with_processes if several else _alone
        return int(uvloop.run(work(engine, server, sock, ready)))


async def _alone(
    engine: EngineConfig, server: ServerConfig, sock: socket.socket, ready: Callable[[], object]
) -> int:
    """HTTP in this process."""
    stop = Stop()
    stop.on_signals()
    options = {one.name: getattr(engine, one.name) for one in fields(engine)}
    model = options.pop("model")
    llm = AsyncLLM(model, max_queued=server.max_queue_len, **options)
    try:
        if not await _before(llm.ready(), stop):
            return 0
        return await run(Service(llm, server), llm, sock, stop, ready)
    finally:
        await llm.close()


async def _before(work: Any, stop: Stop) -> bool:
    """Whether the work is done before somebody asks to stop."""
    tasks = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    is_done = tasks[0].done()
    if is_done:
        tasks[0].result()
    for task in tasks:
        task.cancel()
    return is_done


class ApiProcesses:
    """The processes that speak HTTP, from the process that starts them."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, sock: socket.socket) -> None:
        """Start them and the engine's process, without waiting. Raises OSError."""
        num = server.api_processes
        self._loop = asyncio.get_running_loop()
        self.messages: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.failure: Exception | None = None
        self.engine = EngineProcess(engine, num)
        try:
            self._ranks = self._start(engine, server, sock)
        except BaseException:
            self.engine.close()
            raise
        finally:
            for client in self.engine.clients:
                client.close()
        for one in (self.engine, self._ranks):
            one.call_on_failure(self._failed)

    def _start(self, engine: EngineConfig, server: ServerConfig, sock: socket.socket) -> Ranks:
        num = server.api_processes
        with ExitStack() as stack:
            sizes = {"counts": num * NUMBER_BYTES, "latencies": num * Latencies.SIZE_BYTES}
            memory = {}
            for name, size in sizes.items():
                file = stack.enter_context(tempfile.TemporaryFile())
                os.ftruncate(file.fileno(), size)
                memory[name] = file.fileno()
            clients = [client.fileno() for client in self.engine.clients]
            setup = {
                "engine": setups.options(engine), "server": _as_json(server), "clients": clients,
                "listener": sock.fileno(), **memory,
            }  # fmt: skip
            names = ["the server", *(f"API process {i}" for i in range(num))]
            inherited = [*clients, sock.fileno(), *memory.values()]
            return Ranks.start(
                setup, num + 1, PROGRAM, names=names, received=self._received, inherited=inherited
            )  # fmt: skip

    def tell(self, name: str) -> None:
        if self.failure is None:
            try:
                self._ranks.tell(name)
            except RankFailed as error:
                self.failure = error

    async def close(self) -> None:
        await asyncio.to_thread(self._ranks.close)
        await asyncio.to_thread(self.engine.close)

    def _received(self, name: str, payload: bytes) -> None:
        self._loop.call_soon_threadsafe(self.messages.put_nowait, (name, payload))

    def _failed(self, error: Exception) -> None:
        """Called in other threads."""
        self.failure = self.failure or error
        self._received("", b"")


def _as_json(server: ServerConfig) -> dict[str, Any]:
    """The options as JSON has them, for `ServerConfig`."""
    found = asdict(server)
    return {name: os.fspath(one) if isinstance(one, os.PathLike) else one
            for name, one in found.items()}  # fmt: skip


async def _with_processes(
    engine: EngineConfig, server: ServerConfig, sock: socket.socket, ready: Callable[[], object]
) -> int:
    """HTTP in processes of their own."""
    stop = Stop()
    stop.on_signals()
    processes = ApiProcesses(engine, server, sock)
    try:
        num_ready, codes = 0, list[int]()
        watchers: dict[asyncio.Future[Any], str] = {
            asyncio.create_task(stop.wait()): DRAIN, asyncio.create_task(stop.wait_now()): END_NOW
        }  # fmt: skip
        while len(codes) < server.api_processes:
            message = asyncio.create_task(processes.messages.get())
            done, _ = await asyncio.wait(
                (message, *watchers), return_when=asyncio.FIRST_COMPLETED
            )  # fmt: skip
            for task in done & watchers.keys():
                processes.tell(watchers.pop(task))
            if message not in done:
                message.cancel()
                continue
            name, payload = message.result()
            if processes.failure is not None:
                return _failed(processes.failure)
            if name == ENDED:
                codes.append(json.loads(payload))
            elif name == READY:
                num_ready += 1
                if num_ready == server.api_processes:
                    ready()
        return max(codes)
    finally:
        await processes.close()


def _failed(failure: Exception) -> int:
    if isinstance(failure, ValueError):
        raise failure
    logger.error("%s", failure)
    return 1
