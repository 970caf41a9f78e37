"""A small HTTP/1.1 client on asyncio: JSON requests, and responses of server-sent events.

It parses each event in the call that delivers its bytes, so one process handles tens of thousands
of events per second.
"""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

from nanovllm import programs

T = TypeVar("T")
OnEvent = Callable[[bytes], None]  # takes an event's data
MAX_HEAD_BYTES = 64 << 10
SHOWN_CHARS = 300  # of a response that is not JSON


class HttpResponse(NamedTuple):
    """body: empty for a stream of events, which were passed to the caller one by one."""

    status: int
    body: bytes

    def checked(self) -> HttpResponse:
        """The response itself. Raises ValueError, with the server's message, if it is an error."""
        if self.status == 200:
            return self
        raise ValueError(f"the server returned {self.status}: {error_text(self.body)}")


class Broken(OSError):
    """The connection ended before the response was complete."""


class Address(NamedTuple):
    """A server's address. path: the prefix of all paths, without the final /v1 of the base URLs of
    OpenAI's clients."""

    host: str
    port: int
    path: str
    is_tls: bool

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises ValueError for a URL that is not http or https."""
        text = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"{url!r} is not a server's URL, such as http://127.0.0.1:8000")
        is_tls = parts.scheme == "https"
        default = 443 if is_tls else 80
        return cls(
            parts.hostname, port or default, parts.path.rstrip("/").removesuffix("/v1"), is_tls
        )


class HttpClient:
    """Persistent connections to one server, for one event loop."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises ValueError for an invalid URL or key."""
        self.address = Address.of(url)
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        lines = [f"Host: {host}:{self.address.port}", "Accept: application/json, text/event-stream"]
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise ValueError("the API key must be printable ASCII characters")
            lines.append(f"Authorization: Bearer {api_key}")
        self._head = "".join(f"{line}\r\n" for line in lines)
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if self.address.is_tls else None

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of a request: a POST with a JSON body, or a GET without a body."""
        method = "GET" if body is None else "POST"
        data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        about = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n" if data else ""
        line = f"{method} {self.address.path}{path} HTTP/1.1\r\n"
        return f"{line}{self._head}{about}\r\n".encode() + data

    async def send(self, request: bytes, on_event: OnEvent | None = None) -> HttpResponse:
        """The response to the bytes of `request`. Events go to `on_event` as they arrive, except
        the final [DONE]. Raises OSError, and Broken if the connection ends too early.

        Cancelling closes the connection, which makes servers stop.
        """
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._send_on(connection, request, on_event)
            except Broken:
                if connection.has_received:
                    raise
                # the server closed it while it was idle
        return await self._send_on(await self._connect(), request, on_event)

    async def _connect(self) -> _Connection:
        host, port = self.address.host, self.address.port
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, host, port, ssl=self._tls)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"no connection to host {host!r}, port {port}: {reason}") from error
        return connection

    async def get(self, path: str) -> Any:
        """The JSON at a path of the server. Raises ValueError and OSError."""
        answer = (await self.send(self.request(path))).checked()
        try:
            return json.loads(answer.body)
        except ValueError:
            raise ValueError(f"the server's response to {path} is not JSON") from None

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _send_on(
        self, connection: _Connection, request: bytes, on_event: OnEvent | None
    ) -> HttpResponse:
        try:
            answer = await connection.send(request, on_event)
        except BaseException:
            connection.close()
            raise
        if connection.is_reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return answer


class _Connection(asyncio.Protocol):
    """A connection, for one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[HttpResponse] | None = None
        self._is_closed = False
        self.is_reusable = True
        self.has_received = False

    def send(self, request: bytes, on_event: OnEvent | None) -> asyncio.Future[HttpResponse]:
        self._done = asyncio.get_running_loop().create_future()
        self._on_event, self._status = on_event, 0
        self._rest, self._line, self._body = b"", b"", bytearray()
        self._left: int | None = None  # bytes left of the body; None: chunked, or until the end
        self._is_chunked = self._is_stream = self.has_received = False
        if self._is_closed or self._transport is None:
            self._fail()
        else:
            self._transport.write(request)
        return self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio calls these -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            self.is_reusable = False  # unexpected bytes
            return
        self.has_received = True
        try:
            if self._status:
                self._read_body(data)
            else:
                self._read_head(data)
        except ValueError as error:
            self._end(Broken(f"the server's response is not HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._is_closed, self.is_reusable = True, False
        if self._done is not None and not self._done.done():
            reads_to_the_end = self._status and not self._is_chunked and self._left is None
            self._finish() if reads_to_the_end and error is None else self._fail()

    # the answer ----------------------------------------------------------------------------------

    def _read_head(self, data: bytes) -> None:
        self._rest += data
        head, mark, body = self._rest.partition(b"\r\n\r\n")
        if not mark:
            if len(head) > MAX_HEAD_BYTES:
                raise ValueError("its head is too long")
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        if not first.startswith("HTTP/1."):
            raise ValueError(f"it begins with {first[:20]!r}")
        self._status = int(first[8:12])
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        self._is_chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._is_chunked and "content-length" in headers:
            self._left = int(headers["content-length"])
        is_stream = headers.get("content-type", "").startswith("text/event-stream")
        self._is_stream = is_stream and self._on_event is not None
        if headers.get("connection", "").lower() == "close":
            self.is_reusable = False
        self._rest = b""
        self._read_body(body)

    def _read_body(self, data: bytes) -> None:
        if self._is_chunked:
            self._read_chunks(self._rest + data if self._rest else data)
            return
        self._take(data)
        if self._left is not None:
            self._left -= len(data)
            if self._left <= 0:
                self._finish()

    def _read_chunks(self, data: bytes) -> None:
        """Process the complete chunks in `data`, and keep the rest."""
        begin = 0
        while (line_end := data.find(b"\r\n", begin)) >= 0:
            size = int(data[begin:line_end].partition(b";")[0], 16)
            end = line_end + 2 + size
            if len(data) < end + 2:
                break
            if size == 0:
                self.is_reusable &= len(data) == end + 2
                self._finish()
                return
            self._take(data[line_end + 2 : end])
            begin = end + 2
        self._rest = data[begin:]

    def _take(self, data: bytes) -> None:
        """Process a piece of the body."""
        if not self._is_stream:
            self._body += data
            return
        assert self._on_event is not None
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                content = line[5:].strip()
                if content != b"[DONE]":
                    self._on_event(content)

    def _finish(self) -> None:
        self._end(HttpResponse(self._status, bytes(self._body)))

    def _fail(self) -> None:
        self._end(Broken("the server closed the connection before the end of its response"))

    def _end(self, result: HttpResponse | Broken) -> None:
        if self._done is None or self._done.done():
            return
        if isinstance(result, HttpResponse):
            self._done.set_result(result)
        else:
            self._done.set_exception(result)


def error_text(body: bytes) -> str:
    """The message of an error in OpenAI's format; the beginning of any other response."""
    try:
        found = json.loads(body)
    except ValueError:
        return body[:SHOWN_CHARS].decode(errors="replace").strip() or "an empty response"
    error = found.get("error", found) if isinstance(found, dict) else found
    message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return str(message or error)[: 4 * SHOWN_CHARS]


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop or, if it is not installed, on asyncio's loop."""
    try:
        import uvloop
    except ImportError:
        return run_stoppable(main, asyncio.run)
    return run_stoppable(main, uvloop.run)


def run_stoppable(main: Coroutine[Any, Any, T], run_on_loop: Callable[..., T] = asyncio.run) -> T:
    """Run a coroutine on a loop. Within `programs.sigterm_as_exit`, SIGTERM cancels it.

    SystemExit is raised then. asyncio does the same for Ctrl-C. Raising in the signal handler would
    not work: uvloop drops exceptions raised within a protocol's method.
    """
    if signal.getsignal(signal.SIGTERM) is not programs.exit_at_sigterm:
        return run_on_loop(main)
    is_stopped = False

    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: int, frame: object) -> None:
            nonlocal is_stopped
            is_stopped = True
            if not loop.is_closed():  # else the coroutine has ended, and SystemExit follows
                loop.call_soon_threadsafe(task.cancel)

        signal.signal(signal.SIGTERM, stop)
        return await main

    try:
        result = run_on_loop(cancellable())
    except asyncio.CancelledError:
        if not is_stopped:
            raise
    finally:
        signal.signal(signal.SIGTERM, programs.exit_at_sigterm)
    if is_stopped:
        raise SystemExit(programs.TERMINATED)
    return result
