"""Requests and responses on plain ASGI: reads bodies within limits, sends JSON and events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from nanovllm.api.errors import ApiError
from nanovllm.lora_request import LoRARequest

Result = TypeVar("Result")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Header = tuple[bytes, bytes]
Send = Callable[[Message], Awaitable[None]]

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
NO_STORE = (b"cache-control", b"no-store")
MAX_DROPPED = 4  # a body up to this many times too long is read to its end
MAX_BODIES = 32  # of the greatest length that a process receives at a time


class ClientGone(Exception):
    """The client disconnected before its request or its response was complete."""


@dataclass
class AccessRecord:
    """A request's entry in the access log and in traces. Times are seconds since its arrival.
    route: the path of the endpoint, set once the request may use it."""

    request_id: str
    start: float = field(default_factory=time.perf_counter)
    status: int = 0
    route: str | None = None
    user: str | None = None
    prompt: str | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    first_token: float | None = None

    def has_token(self) -> None:
        if self.first_token is None:
            self.first_token = time.perf_counter() - self.start


class BodyLimits:
    """Limits on the bodies of requests.

    max_bytes: of one body. timeout: the seconds within which it must arrive. num_held: the bytes of
    all bodies that are being received, at most `max_held`.
    """

    def __init__(self, max_bytes: int, timeout: float) -> None:
        self.max_bytes, self.timeout = max_bytes, timeout
        self.num_held, self.max_held = 0, MAX_BODIES * max_bytes

    def error(self, num_bytes: int, num_more: int) -> ApiError | None:
        """Why a body of so many bytes is refused, or `num_more` bytes of it."""
        if num_bytes > self.max_bytes:
            return too_long(self.max_bytes)
        if self.num_held + num_more > self.max_held:
            words = (
                f"the bodies being received have {self.num_held} bytes and {num_more} are added: "
                f"at most {self.max_held} are kept"
            )
            return ApiError(503, words, code="too_many_bodies")
        return None


def too_long(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is longer than {max_bytes} bytes", code="body_too_long")


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, record: AccessRecord) -> None:
        self.scope, self.record = scope, record
        self.api_key = ""  # set once it is checked
        self.adapter: LoRARequest | None = None  # the body's model, if it is one
        self._receive, self._send = receive, send
        self.has_started = False
        self.id_headers = [b"x-request-id"]  # response headers with the request id
        # the last events of a stream that fails; an endpoint may write them in another way
        self.error_events: Callable[[ApiError], bytes] = lambda error: error.events()

    def header(self, name: bytes) -> str:
        """The value of a header; "" if it is missing. name: lower case."""
        found = self.headers(name)
        return found[0] if found else ""

    def headers(self, name: bytes) -> list[str]:
        """The values of all headers with this name. name: lower case."""
        given = self.scope["headers"]
        return [bytes(value).decode("latin-1") for key, value in given if key == name]

    async def body(self, limits: BodyLimits) -> bytes:
        """The body of a JSON request. Raises ApiError (408, 413, 415 or 503) and ClientGone."""
        kind = self.header(b"content-type").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            # web pages can send other types to any server without permission (CORS)
            raise ApiError(415, "the content type must be application/json", code="content_type")
        encoding = self.header(b"content-encoding").strip().lower()
        if encoding not in ("", "identity"):
            words = f"the body has the content encoding {encoding[:20]!r}: send it as plain JSON"
            raise ApiError(415, words, code="content_encoding")
        length = self.header(b"content-length")[:20]
        most = limits.max_bytes
        is_long = length.isdecimal() and int(length) > most
        if is_long and (self.header(b"expect") or int(length) > MAX_DROPPED * most):
            raise too_long(most)
        try:
            return await asyncio.wait_for(self._read(limits), limits.timeout)
        except asyncio.TimeoutError:
            words = f"the body did not arrive within {limits.timeout:g} s"
            raise ApiError(408, words) from None

    async def _read(self, limits: BodyLimits) -> bytes:
        parts, num_bytes, num_held = [], 0, 0
        error: ApiError | None = None
        try:
            while True:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                num_bytes += len(part)
                is_last = not message.get("more_body")
                if error is None or num_bytes > limits.max_bytes:
                    error = limits.error(num_bytes, len(part))
                if error is None:
                    parts.append(part)
                    num_held += len(part)
                    limits.num_held += len(part)
                    if is_last:
                        return b"".join(parts) if len(parts) > 1 else part
                elif is_last or num_bytes > MAX_DROPPED * limits.max_bytes:
                    # not earlier: a client that is still sending does not read the error
                    raise error
                else:
                    parts.clear()
                    limits.num_held -= num_held
                    num_held = 0
        finally:
            limits.num_held -= num_held

    async def gone(self) -> None:
        """Wait until the client disconnects."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of work that may take long. If the client disconnects first, cancels the work
        and raises ClientGone."""
        working, leaving = asyncio.create_task(work), asyncio.create_task(self.gone())
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGone
            return working.result()
        finally:
            working.cancel()
            leaving.cancel()

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.has_started, self.record.status = True, status
        headers += [(name, self.record.request_id.encode()) for name in self.id_headers]
        message = {"type": "http.response.start", "status": status, "headers": headers}
        await self._send(message)

    async def send(self, body: bytes, *, more: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, status: int, body: bytes, headers: Sequence[Header]) -> None:
        """Send a whole response."""
        await self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.send(body)

    async def json(self, content: Any) -> None:
        await self.answer(200, msgspec.json.encode(content), (JSON, NO_STORE))

    async def refuse(self, error: ApiError) -> None:
        """Send an error: as the response or, if that has started, as its last event."""
        if self.has_started:
            await self.send(self.error_events(error))
        else:
            # the rest of a refused body must not be read as the next request
            close = [(b"connection", b"close")] if error.status in (408, 413, 415) else []
            headers = [JSON, NO_STORE, *error.headers, *close]
            await self.answer(error.status, error.body(), headers)
