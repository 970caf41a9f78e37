"""A client's connection to an engine process, in an event loop."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from copy import copy
from typing import Any, cast

from nanovllm.engine.metrics import Metric
from nanovllm.engine.request import EngineInfo
from nanovllm.parallel.channel import pack, unpack
from nanovllm.replicas import messages
from nanovllm.replicas.messages import LoraReply
from nanovllm.replicas.metric_aggregation import LastMetrics


class Connection(asyncio.Protocol):
    """Calls `received(payload)` for new tokens, and `lost()` when the socket closes.

    info: the engine's description, once it is warm.
    """

    def __init__(self, received: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._on_outputs, self._on_loss = received, lost
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self.info: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self.is_lost = False
        self._failure: Exception | None = None
        self._asked: list[asyncio.Future[None]] = []
        self._metrics = LastMetrics()
        self._lora_replies: deque[asyncio.Future[LoraReply]] = deque()  # in the order of messages

    @classmethod
    async def open(
        cls, sock: socket.socket, received: Callable[[bytes], None], lost: Callable[[], None]
    ) -> Connection:
        """Takes ownership of the socket."""
        loop = asyncio.get_running_loop()
        _, found = await loop.create_unix_connection(lambda: cls(received, lost), sock=sock)
        return found

    async def metrics(self) -> list[Metric]:
        """The engine's metrics; for a lost engine the last ones, with gauges at 0. Raises the error
        that `fail` was called with."""
        self._check()
        if not self.is_lost:
            self._asked.append(asyncio.get_running_loop().create_future())
            if len(self._asked) == 1:
                self.send(messages.METRICS)
            await asyncio.shield(self._asked[-1])
        return self._metrics.all

    async def ask_lora(self, name: str, payload: bytes) -> LoraReply:
        """The reply to ADD_LORA or REMOVE_LORA. Raises the error that `fail` was called with."""
        self._check()
        reply: asyncio.Future[LoraReply] = asyncio.get_running_loop().create_future()
        self._lora_replies.append(reply)
        self.send(name, payload)
        return await asyncio.shield(reply)

    def follow(self, lost: Connection) -> None:
        """Be the connection to an engine that was started in the place of a lost one. It is lost,
        too, until that is ready."""
        self.is_lost = True
        self._metrics.follow(lost._metrics)

    def rest(self) -> None:
        """Note that the engine does nothing any more, but other engines go on."""
        self.is_lost = True
        self._metrics.rest()
        self._drop_lora_replies()
        self._answer()

    def fail(self, error: Exception) -> None:
        """Raise the error in everything that waits for the engine, and in later questions."""
        self._failure = error
        waiting: list[asyncio.Future[Any]] = [self.info, *self._asked, *self._lora_replies]
        self._asked = []
        self._lora_replies.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(copy(error))
                future.exception()  # else it is logged where the waiting task was cancelled

    def _check(self) -> None:
        if self._failure is not None:
            raise copy(self._failure)

    def _answer(self) -> None:
        asked, self._asked = self._asked, []
        for future in asked:
            if not future.done():
                future.set_result(None)

    def _drop_lora_replies(self) -> None:
        """The engine has ended: one that follows reads adapters when requests name them."""
        while self._lora_replies:
            self._lora_replies.popleft().set_result(LoraReply(False))

    def _take(self, name: str, payload: bytes) -> None:
        if name == messages.OUTPUTS:
            self._on_outputs(payload)
        elif name == messages.METRICS:
            self._metrics.note(messages.load_metrics(payload))
            self._answer()
        elif name in (messages.ADD_LORA, messages.REMOVE_LORA):
            self._lora_replies.popleft().set_result(messages.load_lora_reply(payload))
        else:
            assert name == messages.READY, name
            self.info.set_result(messages.load_info(payload))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (message := unpack(self._received)) is not None:
            self._take(*message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_loss()

    def send(self, name: str, payload: bytes = b"") -> None:
        """Send a message without waiting. Does nothing after the connection has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(name, payload))

    def send_packed(self, message: bytes) -> None:
        """Send a message packed by `pack`; long ones can be packed in a thread."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(message)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
