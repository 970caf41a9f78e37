"""A server with the paths of OpenAI's API, whose answers come at known times. It has no model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

WAIT_S = 60.0  # for what takes milliseconds on an idle machine


@dataclass
class Mock:
    """How it answers, and what it was asked.

    ttft, itl: seconds before the first event, and between two. tokens_per_event: of each event.
    error_every: every so-many-th request gets a 400, broken_every: loses its connection after
    three events. splits: bytes of a write, so that events come in parts. dies_after: the number of
    events after which all connections end and no new ones are taken. gathers: no answer begins
    before so many requests have been there at once. sleep: waits for ttft and itl. times: when
    each request had come, and just before each piece of its answer was sent, so that no client can
    begin later or receive earlier.
    """

    ttft: float = 0.0
    itl: float = 0.0
    tokens_per_event: int = 1
    error_every: int = 0
    broken_every: int = 0
    splits: int = 0
    dies_after: int = 0
    gathers: int = 0
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    answer: str = "word "
    api_key: str = ""
    models: tuple[str, ...] = ("mock",)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)
    num_connections: int = 0
    num_events: int = 0
    most_at_once: int = 0
    num_open: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(head.split()[1], headers, body, writer)
        self._writers.discard(writer)
        writer.close()

    async def _answer(
        self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if self.api_key and headers.get("authorization") != f"bearer {self.api_key}":
            return self._whole(writer, 401, {"error": {"message": "no such key"}})
        if path == "/v1/models":
            return self._whole(writer, 200, {"data": [{"id": one} for one in self.models]})
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return self._whole(writer, 404, {"detail": "Not Found"})
        asked = json.loads(body)
        self.bodies.append(asked)
        if self.error_every and len(self.bodies) % self.error_every == 0:
            return self._whole(writer, 400, {"error": {"message": "not this one"}})
        self.num_open += 1
        self.most_at_once = max(self.most_at_once, self.num_open)
        try:
            await self._stream(asked, path.startswith("/v1/chat"), writer)
        finally:
            self.num_open -= 1

    async def _stream(
        self, asked: dict[str, Any], is_chat: bool, writer: asyncio.StreamWriter
    ) -> None:
        breaks = self.broken_every and len(self.bodies) % self.broken_every == 0
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        if is_chat:
            role = {"role": "assistant", "content": ""}
            await self._event(writer, {"choices": [{"index": 0, "delta": role}]})
        num_tokens = asked.get("max_tokens", 5)
        times = [time.monotonic()]
        self.times.append(times)
        deadline = times[0] + WAIT_S
        while self.most_at_once < self.gathers and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        await self.sleep(self.ttft)
        for begin in range(0, num_tokens, self.tokens_per_event):
            if begin:
                await self.sleep(self.itl)
            if breaks and begin >= 3 * self.tokens_per_event:
                writer.transport.abort()
                raise ConnectionResetError
            content = {"delta": {"content": self.answer}} if is_chat else {"text": self.answer}
            choice = {"index": 0, **content, "logprobs": None, "finish_reason": None}
            if begin + self.tokens_per_event >= num_tokens:
                choice["finish_reason"] = "length"
            times.append(time.monotonic())
            await self._event(writer, {"id": "x", "choices": [choice], "usage": None})
            self.num_events += 1
            if self.dies_after and self.num_events >= self.dies_after:
                self._die()
                raise ConnectionResetError
        prompt = asked.get("prompt", "")
        if (asked.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": len(prompt), "completion_tokens": num_tokens}
            await self._event(writer, {"id": "x", "choices": [], "usage": usage})
        await self._event(writer, None)
        await self._write(writer, b"0\r\n\r\n")

    async def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any] | None) -> None:
        text = "[DONE]" if event is None else json.dumps(event, separators=(",", ":"))
        data = f"data: {text}\n\n".encode()
        if writer.transport.is_closing():
            raise ConnectionResetError
        await self._write(writer, b"%x\r\n%b\r\n" % (len(data), data))

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        size = self.splits or len(data)
        for begin in range(0, len(data), size):
            writer.write(data[begin : begin + size])
            if self.splits:
                await asyncio.sleep(0.001)

    def _whole(self, writer: asyncio.StreamWriter, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def _die(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _run(self, is_up: threading.Event) -> None:
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = await asyncio.start_server(self.handle, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        self._end = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        is_up.set()
        await self._end.wait()
        self._die()


@contextmanager
def serving(**behaviour: Any) -> Iterator[Mock]:
    """A mock that listens on a free port until the end of the block."""
    mock, is_up = Mock(**behaviour), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(mock._run(is_up)), daemon=True)
    thread.start()
    assert is_up.wait(WAIT_S)
    try:
        yield mock
    finally:
        mock._loop.call_soon_threadsafe(mock._end.set)
        thread.join(WAIT_S)
