"""Runs the application in an event loop: sockets, TLS, signals, the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Protocol

import uvicorn

from nanovllm.api.app import App, with_cors
from nanovllm.api.config import ServerConfig
from nanovllm.api.protocol import protocol_options
from nanovllm.api.service import Service
from nanovllm.serving.interface import AsyncEngine

logger = logging.getLogger(__name__)
CHECK_S = 0.2
LAST_WORDS_S = 0.5  # for errors to reach clients, after the engine has failed
CLOSE_S = 3  # then connections are closed whose clients do not read
KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))


class Drainable(AsyncEngine, Protocol):
    """An engine that can end in order."""

    async def drain(self, timeout: float | None = None) -> object: ...


class Stop:
    """The wish to end: at first in order, at the second SIGINT at once."""

    def __init__(self) -> None:
        self._orderly, self._now = asyncio.Event(), asyncio.Event()

    def ask(self, *, at_once: bool = False) -> None:
        if at_once or self._orderly.is_set():
            self._now.set()
        self._orderly.set()

    def on_signals(self) -> None:
        """SIGTERM and SIGINT ask to end. Call it in the main thread."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self.ask)
        loop.add_signal_handler(signal.SIGTERM, self._orderly.set)

    async def wait(self) -> None:
        await self._orderly.wait()

    async def wait_now(self) -> None:
        await self._now.wait()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are ours: see `Stop`


def bind(config: ServerConfig) -> socket.socket:
    """A socket at the server's address. It listens once the server runs. Raises OSError."""
    found = socket.getaddrinfo(
        config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # connections inherit these: a peer that is gone without a word is noticed
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def url_of(config: ServerConfig, sock: socket.socket) -> str:
    """Where clients find the server."""
    host, port = sock.getsockname()[:2]
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


async def run(
    service: Service,
    engine: Drainable,
    sock: socket.socket,
    stop: Stop,
    on_ready: Callable[[], object] = lambda: None,
) -> int:
    """Serve until somebody asks to stop, or the engine fails. Returns the exit code.

    At the wish to stop, running requests have `drain_timeout` seconds to finish; new ones are
    refused meanwhile.
    """
    config = service.config
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    options = uvicorn.Config(
        with_cors(App(service)),
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        timeout_graceful_shutdown=CLOSE_S,
        **protocol_options(config),
    )
    server = _Server(options)
    tasks = [
        asyncio.create_task(work)
        for work in (server.serve([sock]), _failure(engine), stop.wait(), service.prompts.warm())
    ]
    serving, failing, stopping, _ = tasks
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.001)
        on_ready()
        await asyncio.wait((serving, failing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            logger.error("the server ends: the engine has failed")
            await asyncio.sleep(LAST_WORDS_S)
        else:
            await _drain(engine, config.drain_timeout, stop)
        server.should_exit = True
        await serving
    finally:
        for task in tasks:
            task.cancel()
    return 1 if engine.failure is not None else 0


async def _failure(engine: AsyncEngine) -> None:
    """Wait until the engine has failed."""
    while engine.failure is None:
        await asyncio.sleep(CHECK_S)


async def _drain(engine: Drainable, timeout: float, stop: Stop) -> None:
    logger.info("the server ends: running requests have %g s", timeout)
    draining = asyncio.create_task(engine.drain(timeout))  # type: ignore[arg-type]
    hurry = asyncio.create_task(stop.wait_now())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not draining.done():
        draining.cancel()
        await engine.drain(0)
