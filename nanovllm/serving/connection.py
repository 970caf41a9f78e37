"""The client's end of its socket to the engine's process, in an event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from nanovllm.parallel.channel import pack, unpack


class Connection(asyncio.Protocol):
    """Calls `received(name, payload)` for every message, and `lost()` once the socket closes."""

    def __init__(self, received: Callable[[str, bytes], None], lost: Callable[[], None]) -> None:
        self._on_message, self._on_loss = received, lost
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(
        cls, sock: socket.socket, received: Callable[[str, bytes], None], lost: Callable[[], None]
    ) -> Connection:
        """Takes over the socket."""
        loop = asyncio.get_running_loop()
        _, found = await loop.create_unix_connection(lambda: cls(received, lost), sock=sock)
        return found

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (message := unpack(self._received)) is not None:
            self._on_message(*message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_loss()

    def send(self, name: str, payload: bytes = b"") -> None:
        """Send a message without waiting. After the end of the connection it does nothing."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(name, payload))

    def send_packed(self, message: bytes) -> None:
        """Send a message that was packed by `pack`; a thread can pack a long one."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(message)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
