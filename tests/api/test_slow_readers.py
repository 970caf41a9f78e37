"""Clients that read slowly stay connected; those that do not read are disconnected in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from nanovllm.api.config import ServerConfig
from nanovllm.api.connection_limits import LimitedProtocol, protocol_options

SEND_S = 19.0


class Timer:
    def __init__(self, seconds: float, work: Callable[[], None]) -> None:
        self.seconds, self.work = seconds, work
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Loop:
    """Keeps timers, which a test fires."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, seconds: float, work: Callable[[], None]) -> Timer:
        self.timers.append(Timer(seconds, work))
        return self.timers[-1]

    def waiting(self) -> list[Timer]:
        """Those of clients that do not read."""
        return [one for one in self.timers if one.seconds == SEND_S and not one.is_cancelled]

    def fire(self) -> None:
        (timer,) = self.waiting()
        self.timers.remove(timer)
        timer.work()


class Transport:
    """num_bytes: what is not sent."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.num_bytes

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted

    def get_extra_info(self, name: str) -> None:
        return None


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def protocol(loop: Loop) -> LimitedProtocol:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("no request comes")

    config = uvicorn.Config(app, **protocol_options(ServerConfig(send_timeout=SEND_S)))
    config.load()
    made: LimitedProtocol = config.http_protocol_class(
        config=config, server_state=ServerState(), app_state={}, _loop=loop
    )  # type: ignore[call-arg]
    return made


def test_a_client_that_reads_stays_connected(loop: Loop, protocol: LimitedProtocol) -> None:
    transport: Any = Transport()
    protocol.connection_made(transport)
    transport.num_bytes = 1000
    protocol.pause_writing()
    for transport.num_bytes in (999, 500, 499):
        loop.fire()
        assert not transport.is_aborted
    protocol.resume_writing()
    assert not loop.waiting()


def test_a_client_that_stops_reading_is_disconnected(loop: Loop, protocol: LimitedProtocol) -> None:
    transport: Any = Transport()
    protocol.connection_made(transport)
    transport.num_bytes = 1000
    protocol.pause_writing()
    transport.num_bytes = 500
    loop.fire()
    loop.fire()
    assert transport.is_aborted


def test_bytes_that_tls_has_passed_on_are_unsent_too(loop: Loop, protocol: LimitedProtocol) -> None:
    raw: Any = Transport()
    outer: Any = Transport()
    protocol.accept(raw)
    protocol.connection_made(outer)
    raw.num_bytes, outer.num_bytes = 1000, 500
    protocol.pause_writing()
    for raw.num_bytes in (900, 100):
        loop.fire()
        assert not outer.is_aborted
    loop.fire()
    assert outer.is_aborted
