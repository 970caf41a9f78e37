"""uvicorn's HTTP protocol with limits on connections, headers, time, and pipelined data."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanovllm.api import tls
from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import ApiError
from nanovllm.api.tls_protocol import TlsProtocol

MAX_HEADERS = 100
HEAD_END = b"\r\n\r\n"  # also of a chunked body
LINE_ENDS = re.compile(rb"[\r\n]+")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
FIRST_PROBE_S, MAX_PROBE_S = 0.25, 4.0


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


class _Flow(FlowControl):
    """Resumes reading only while few bytes are held."""

    def __init__(self, transport: asyncio.Transport, held: bytearray) -> None:
        super().__init__(transport)
        self._held = held

    def resume_reading(self) -> None:
        if self.read_paused and len(self._held) <= HIGH_WATER_LIMIT:
            super().resume_reading()


class LimitedProtocol(HttpToolsProtocol):
    """One connection. uvicorn has none of these limits.

    The parser gets the bytes of one request at a time. Later bytes are held until its response is
    complete; beyond 64 KiB they stay in the kernel. So pipelined requests take no more memory than
    one, and malformed bytes do not lose the responses to earlier requests.
    """

    limits: ServerConfig
    idle: dict[LimitedProtocol, None]  # connections without a request, longest idle first

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        is_accepted = self.transport is not None  # with TLS
        super().connection_made(transport)  # type: ignore[arg-type]
        if not is_accepted:
            self.accept(self.transport)
        self.flow = _Flow(self.transport, self._held)

    def accept(self, raw: asyncio.Transport) -> None:
        """Count a connection, before a TLS handshake if there is one. raw: its TCP transport."""
        self.transport = self._raw = raw
        self.connections.add(self)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._num_header_bytes = 0  # received since the last complete headers or part of a body
        self._held = bytearray()  # received after the current request
        self._num_body_bytes = 0  # still missing from the body, if its length is known
        self._is_receiving = False  # a part of a request is missing
        self._is_answering = False  # the request is complete, its response is not
        self._has_eof = False  # the client has closed its sending side
        if len(self.connections) > self.limits.max_connections and not self._replace_idle():
            if self.scheme is None:  # TLS: an answer would need the handshake
                raw.abort()
            else:
                self._end(FULL)
            return
        self.idle[self] = None
        self._time("headers", self.limits.header_timeout)

    def _replace_idle(self) -> bool:
        """Close the longest idle connection. Returns False if none is idle."""
        longest = next(iter(self.idle), None)
        if longest is None:
            return False
        del self.idle[longest]
        longest.transport.abort()  # nothing is left to send, and TLS would wait
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        for name in tuple(self._timers):
            self._stop(name)
        self.idle.pop(self, None)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._held.clear()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        num_bytes = 0 if self._is_answering else self._parse(data)
        if num_bytes < len(data):
            self._held += data[num_bytes:]
            if len(self._held) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()

    def _parse(self, data: bytes | bytearray) -> int:
        """Feed the parser up to the end of a request. Returns the number of bytes consumed."""
        self._unset_keepalive_if_required()
        at, size = 0, len(data)
        while at < size and not self._is_answering:
            end = self._end_of_piece(data, at, size)
            at += self._feed(data[at:end])  # a copy: `_end` clears the held bytes
            if self.transport.is_closing():
                return size
        is_waiting = self._is_receiving or self.timeout_keep_alive_task is None
        if is_waiting and self._is_idle and "headers" not in self._timers:
            self._time("headers", self.limits.header_timeout)
        return at

    def _end_of_piece(self, data: bytes | bytearray, at: int, size: int) -> int:
        """The end of the bytes from `at` that cannot belong to a second request."""
        if self._num_body_bytes:
            return min(at + self._num_body_bytes, size)
        if data[at] in b"\r\n":  # the rest of a head's end that was split
            line_ends = LINE_ENDS.match(data, at)
            assert line_ends is not None
            return line_ends.end()
        found = data.find(HEAD_END, at)
        return size if found < 0 else found + len(HEAD_END)

    def _feed(self, piece: bytes | bytearray) -> int:
        """Feed the parser. Returns the number of bytes consumed."""
        # the parser buffers incomplete headers, also trailers
        self._num_header_bytes += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade()
            return int(upgrade.args[0])
        except httptools.HttpParserError:
            self._end(BAD)
        if self._num_header_bytes > self.limits.max_header_bytes:
            self._end(TOO_LONG)
        return len(piece)

    def _ignore_upgrade(self) -> None:
        """Parse the head again without the Upgrade header. A server may ignore it (RFC 9110, 7.8),
        but the parser would treat the body as bytes of another protocol."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._end(BAD)
            return
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        lines += [b"%b: %b" % pair for pair in self.headers if pair[0] != b"upgrade"]
        self._num_header_bytes = 0
        self._feed(b"\r\n".join(lines) + HEAD_END)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_receiving = True

    def on_headers_complete(self) -> None:
        if self.transport.is_closing() or self.parser.should_upgrade():
            return
        self._stop("headers")
        self.idle.pop(self, None)
        num_bytes = len(self.url)
        for name, value in self.headers:
            num_bytes += len(name) + len(value)
            if name == b"content-length":
                self._num_body_bytes = int(value)
        self._num_header_bytes = 0
        if num_bytes > self.limits.max_header_bytes or len(self.headers) > MAX_HEADERS:
            self._end(TOO_LONG)
            return
        super().on_headers_complete()
        self.headers = []  # fields after the body are not headers of the request

    def on_body(self, body: bytes) -> None:
        self._num_header_bytes = 0
        if self._num_body_bytes:
            self._num_body_bytes -= len(body)
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.transport.is_closing() or self.parser.should_upgrade():
            return
        self._is_receiving = False
        if not self._is_idle:
            self._is_answering = True
            super().on_message_complete()
            return
        self._stop("headers")  # the response is complete and did not need the body
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def on_response_complete(self) -> None:
        self._is_answering = False
        super().on_response_complete()
        if self.transport.is_closing():
            return
        self.idle[self] = None
        if self._held:
            del self._held[: self._parse(self._held)]
            self.flow.resume_reading()
        if self._has_eof:
            self._stop("probe")
            if self._is_answering:
                self._probe_after(FIRST_PROBE_S)
            else:
                self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open. A client may close only its sending side and wait for
        the response. A fully closed connection looks the same until a write fails, so the server
        probes it."""
        if not self._is_answering or self.scheme == "https":  # TLS has no half-closed connections
            return False
        if not self._has_eof:
            self._has_eof = True
            self._probe_after(FIRST_PROBE_S)
        return True

    def _probe_after(self, seconds: float) -> None:
        self._timers["probe"] = self.loop.call_later(seconds, self._probe, seconds)

    def _probe(self, seconds: float) -> None:
        """Write bytes that clients do not mistake for a response, unless the response is being
        sent. If the client has closed the connection, a later write ends it."""
        if not self.cycle.response_started:
            if self.scope["http_version"] == "1.0":
                self.transport.abort()  # HTTP/1.0 has no 100 Continue
                return
            self.transport.write(CONTINUE)
        self._probe_after(min(2 * seconds, MAX_PROBE_S))

    def send_400_response(self, msg: str) -> None:
        self._end(BAD)

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being received, beyond its head, or answered."""
        return self.cycle is None or self.cycle.response_complete

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def _await_reader(self) -> None:
        self._time("send", self.limits.send_timeout, partial(self._check_reader, self._num_unsent))

    def _check_reader(self, num_before: int) -> None:
        """Close the connection if the client has read nothing for a while. num_before: the bytes
        that were unsent then."""
        if self._num_unsent < num_before:
            self._await_reader()
        else:
            self.transport.abort()

    @property
    def _num_unsent(self) -> int:
        num = self._raw.get_write_buffer_size()
        return num if self._raw is self.transport else num + self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        self._stop("send")
        super().resume_writing()

    def _end(self, answer: bytes) -> None:
        """Answer a malformed request with an error, unless a response has started, and close."""
        if self.transport.is_closing():
            return
        self._stop("headers")
        self._held.clear()
        if self._is_idle:
            self.transport.write(answer)
        elif not self.cycle.response_started:  # the application is waiting for the body
            self.transport.write(answer)
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _time(self, name: str, seconds: float, work: Callable[[], None] | None = None) -> None:
        """Do the work, by default close the connection, unless `_stop` is called within these
        seconds."""
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, work or self.transport.abort)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


def protocol_options(limits: ServerConfig) -> dict[str, Any]:
    """uvicorn's options for these limits."""
    kind = type("Protocol", (LimitedProtocol,), {"limits": limits, "idle": {}})
    context = tls.context(limits)
    return {
        "http": kind if context is None else partial(TlsProtocol, kind, context, limits),
        "timeout_keep_alive": limits.keep_alive_timeout,
        "ws": "none", "lifespan": "off", "access_log": False, "log_config": None,
        "server_header": False, "date_header": True, "proxy_headers": False, "loop": "uvloop",
        "backlog": 2048,
    }  # fmt: skip
