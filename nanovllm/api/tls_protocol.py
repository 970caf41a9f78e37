"""TLS whose connections count from the moment that they are accepted."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Protocol

from uvloop.loop import SSLProtocol  # type: ignore[attr-defined]

from nanovllm.api.config import ServerConfig


class Inner(Protocol):
    """The protocol of what is decrypted. flow: None until its connection is made."""

    loop: asyncio.AbstractEventLoop
    flow: Any

    def accept(self, raw: asyncio.Transport) -> None:
        """Count a connection, before its handshake. May abort it."""

    def connection_lost(self, exc: Exception | None) -> None: ...


class TlsProtocol(SSLProtocol):  # type: ignore[misc]
    """The TLS of one connection, with limits from its beginning.

    `create_server(ssl=…)` makes the same, but calls the inner protocol only after the handshake,
    and does not give it the TCP transport, which has most of the unsent bytes.
    """

    def __init__(
        self,
        kind: Callable[..., Inner],
        context: ssl.SSLContext,
        limits: ServerConfig,
        **given: Any,
    ) -> None:
        """kind: makes the inner protocol of `given`, the arguments of uvicorn's protocols."""
        self.inner = kind(**given)
        super().__init__(
            self.inner.loop, self.inner, context, None, server_side=True,
            ssl_handshake_timeout=limits.header_timeout, ssl_shutdown_timeout=limits.send_timeout,
        )  # fmt: skip

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.inner.accept(transport)
        if not transport.is_closing():
            super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)  # tells the inner protocol if its connection was made
        if self.inner.flow is None:
            self.inner.connection_lost(exc)
        del self.inner  # a circle, which only the garbage collector would free
