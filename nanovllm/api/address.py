"""The server's listening socket. Imports neither uvicorn nor the application."""

from __future__ import annotations

import socket

from nanovllm.api.config import ServerConfig

KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))


def bind(config: ServerConfig) -> socket.socket:
    """A socket bound to the server's address; it listens once the server runs. Raises OSError with
    the address."""
    try:
        return _bound(config.host, config.port)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"the server cannot listen at host {config.host!r}, port {config.port}: {reason}"
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # connections inherit these: keepalive detects peers that vanished without closing
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def url_of(config: ServerConfig, sock: socket.socket) -> str:
    """The server's base URL."""
    host, port = sock.getsockname()[:2]
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
