"""Runs the application in an event loop, with TLS, until a shutdown is requested."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any, Protocol

import uvicorn

from nanovllm import open_files
from nanovllm.api.app import App, with_cors
from nanovllm.api.config import ServerConfig
from nanovllm.api.connection_limits import protocol_options
from nanovllm.api.root_path import below
from nanovllm.api.service import Service
from nanovllm.api.trusted_host import TrustedHosts
from nanovllm.serving.async_engine import AsyncEngine

logger = logging.getLogger(__name__)
CHECK_S = 0.2
OTHER_FILES = 128  # besides client connections: the engine, images, libraries
LAST_WORDS_S = 0.5  # time for errors to reach clients after the engine failed
CLOSE_S = 3  # then connections of clients that do not read are closed


class Drainable(AsyncEngine, Protocol):
    """An engine that can be drained."""

    async def drain(self, timeout: float | None = None) -> object: ...


class Stop:
    """A shutdown request, which is made once `wish` is done."""

    def __init__(self, wish: Awaitable[object]) -> None:
        self._wish = asyncio.ensure_future(wish)

    async def wait(self) -> None:
        await asyncio.shield(self._wish)

    async def before(self, work: Coroutine[Any, Any, object]) -> bool:
        """Whether work finishes before a shutdown is requested, which cancels it. Raises its
        error."""
        task = asyncio.create_task(work)
        await asyncio.wait((task, self._wish), return_when=asyncio.FIRST_COMPLETED)
        is_done = task.done()
        if is_done:
            task.result()
        task.cancel()
        return is_done


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `Stop` handles signals


async def run(
    service: Service,
    engine: Drainable,
    sock: socket.socket,
    stop: Stop,
    on_ready: Callable[[], object] = lambda: None,
) -> int:
    """Serve until a shutdown is requested or the engine fails. Returns the exit code.

    On a shutdown request, running requests have `drain_timeout` seconds to finish; new ones are
    refused.
    """
    config = service.config
    uvicorn_logger = logging.getLogger("uvicorn.error")
    uvicorn_logger.setLevel(uvicorn.config.LOG_LEVELS[config.uvicorn_log_level])
    uvicorn_logger.handlers = logging.getLogger("nanovllm").handlers
    options = uvicorn.Config(
        below(
            config.root_path, with_cors(App(service, TrustedHosts(config, sock.getsockname()[0])))
        ),
        timeout_graceful_shutdown=CLOSE_S,
        **protocol_options(_fitting(config)),
    )
    server = _Server(options)
    tasks = [
        asyncio.create_task(work)
        for work in (server.serve([sock]), _failure(engine), stop.wait(), _warm(service))
    ]
    serving, failing, stopping, _ = tasks
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.001)
        on_ready()
        await asyncio.wait((serving, failing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            await asyncio.sleep(LAST_WORDS_S)
        else:
            await engine.drain(config.drain_timeout)
        server.should_exit = True
        await serving
    finally:
        for task in tasks:
            task.cancel()
        if service.traces is not None:
            await asyncio.to_thread(service.traces.close)
    return 1 if engine.failure is not None else 0


def _fitting(config: ServerConfig) -> ServerConfig:
    """The options, with `max_connections` reduced to the process's limit of open files. Without a
    free file the server could neither refuse a connection nor open an image."""
    wanted = config.max_connections + OTHER_FILES
    num_files = open_files.allow(wanted)
    if num_files >= wanted:
        return config
    most = max(1, num_files - OTHER_FILES)
    logger.warning(
        "max_connections is %d, but the process can have only %d open files (ulimit -n): serving "
        "%d connections", config.max_connections, num_files, most,
    )  # fmt: skip
    return replace(config, max_connections=most)


async def _warm(service: Service) -> None:
    await service.prompts.warm()
    gc.freeze()  # collecting the objects of all modules would delay all streams


async def _failure(engine: AsyncEngine) -> None:
    """Wait until the engine fails."""
    while engine.failure is None:
        await asyncio.sleep(CHECK_S)
