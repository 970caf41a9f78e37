"""uvicorn's HTTP protocol with limits on connections, headers and time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import ApiError

MAX_HEADERS = 100


def _canned(status: str, error: ApiError) -> bytes:
    body = error.body()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    extra = b"".join(b"%b: %b\r\n" % pair for pair in error.headers)
    return head.encode() + extra + b"content-length: %d\r\n\r\n%b" % (len(body), body)


FULL = _canned("503 Service Unavailable", ApiError(503, "the server has too many connections"))
TOO_LONG = _canned(
    "431 Request Header Fields Too Large", ApiError(431, "the headers of the request are too long")
)
BAD = _canned("400 Bad Request", ApiError(400, "this is not an HTTP request", code="invalid_http"))


class LimitedProtocol(HttpToolsProtocol):
    """One connection. uvicorn itself has none of these limits."""

    limits: ServerConfig

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._num_header_bytes = 0  # received since the last complete headers or part of a body
        if len(self.connections) > self.limits.max_connections:
            self._end(FULL)
            return
        self._time("headers", self.limits.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in tuple(self._timers):
            self._stop(name)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        # the parser keeps incomplete headers: also those of the next request while this one is
        # answered, and those after a body
        self._num_header_bytes += len(data)
        if self._is_idle and "headers" not in self._timers:
            self._time("headers", self.limits.header_timeout)
        super().data_received(data)
        if self._num_header_bytes > self.limits.max_header_bytes:
            self._end(TOO_LONG)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_headers = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_headers:
            return  # after a body: it is no header of the request
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS and not self.transport.is_closing():
            self._end(TOO_LONG)

    def on_headers_complete(self) -> None:
        self._has_headers = True
        self._stop("headers")
        if self.transport.is_closing():
            return
        num_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        self._num_header_bytes = 0
        if num_bytes > self.limits.max_header_bytes:
            self._end(TOO_LONG)
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_header_bytes = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._end(BAD)

    @property
    def _is_idle(self) -> bool:
        """Whether no answer is being sent."""
        return self.cycle is None or self.cycle.response_complete

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time("send", self.limits.send_timeout)

    def resume_writing(self) -> None:
        self._stop("send")
        super().resume_writing()

    def _end(self, answer: bytes) -> None:
        """Answer a malformed request with an error, unless another answer has begun, and close."""
        self._stop("headers")
        if self._is_idle:
            self.transport.write(answer)
        self.transport.close()

    def _time(self, name: str, seconds: float) -> None:
        """Close the connection if `_stop` is not called within these seconds."""
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


def protocol_options(limits: ServerConfig) -> dict[str, Any]:
    """uvicorn's options for these limits."""
    return {
        "http": type("Protocol", (LimitedProtocol,), {"limits": limits}),
        "timeout_keep_alive": limits.keep_alive_timeout,
        "ws": "none", "lifespan": "off", "access_log": False, "log_config": None,
        "server_header": False, "date_header": True, "proxy_headers": False, "loop": "uvloop",
        "backlog": 2048,
    }  # fmt: skip
