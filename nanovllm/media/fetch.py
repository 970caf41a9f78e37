"""Download one file over https from an allowed host with a public address."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Sequence
from urllib.parse import SplitResult, quote, urlsplit

HTTPS_PORT = 443
CHUNK_BYTES = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 ones (RFC 6052)
# IANA's registries of special addresses, of IPv4 and below; all others are public. Python's
# `is_global` depends on its version, and accepts some of these.
SPECIAL_IPV4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
            "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24",
            "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15",
            "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        ),
    )
)  # fmt: skip
# In IPv6 only this block has global unicast addresses. Within it, these are tunnels (Teredo in
# 2001::/23, 6to4), documentation, benchmarks and AS112.
GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
SPECIAL_IPV6 = tuple(
    map(
        ipaddress.IPv6Network,
        ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
    )
)


def fetch(url: str, domains: Sequence[str], max_bytes: int, timeout_s: float) -> bytes:
    """The file that `url` names.

    The host is resolved once. The connection goes to the checked address, so a second DNS answer
    cannot redirect it. Raises ValueError; messages do not contain the URL.
    """
    parts = _parts(url)
    host, port = _allowed(parts, domains)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = f"?{quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else ""
    try:
        connection = PinnedConnection(host, port, public_address(host, port), timeout_s)
        return download(connection, path + query, max_bytes, timeout_s)
    except (OSError, http.client.HTTPException):
        raise ValueError("the remote file cannot be read") from None


def _parts(url: str) -> SplitResult:
    if any(sign <= " " or sign in "\\\x7f" for sign in url):
        raise ValueError("the URL has spaces or control characters")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("the URL cannot be read") from None
    if parts.scheme.lower() != "https":
        raise ValueError("the URL is not https: remote files are read over https only")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL has a user name or password, which is not supported")
    return parts


def _allowed(parts: SplitResult, domains: Sequence[str]) -> tuple[str, int]:
    """(host, port) of a URL. Raises ValueError unless `allowed_media_domains` has them."""
    try:
        host = (parts.hostname or "").encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise ValueError("the host of the URL is not a name") from None
    port = parts.port or HTTPS_PORT
    known = {(one if ":" in one else f"{one}:{HTTPS_PORT}").lower() for one in domains}
    if not host or f"{host}:{port}" not in known:
        raise ValueError("the host of the URL is not in allowed_media_domains")
    return host, port


def public_address(host: str, port: int) -> str:
    """The first address of a host. Raises ValueError if any of its addresses is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ValueError("the host of the URL has no address") from None
    addresses = [str(one[4][0]) for one in found]
    if not addresses or not all(map(is_public, addresses)):
        raise ValueError("the host of the URL has an address that is not public")
    return addresses[0]


def is_public(text: str) -> bool:
    """Whether an address is reached over the public internet. An IPv4 address inside an IPv6
    address counts as itself; tunnels of either kind are not public."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        else:
            return (
                address.scope_id is None  # the name of an interface
                and address in GLOBAL_IPV6
                and not any(address in one for one in SPECIAL_IPV6)
            )
    return not any(address in one for one in SPECIAL_IPV4)


class PinnedConnection(http.client.HTTPSConnection):
    """https to a host at a resolved address. The certificate is checked for the host."""

    def __init__(self, host: str, port: int, address: str, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._address, self._tls = address, ssl.create_default_context()

    def connect(self) -> None:
        raw = socket.create_connection((self._address, self.port), self.timeout)
        # `sock` is set before the handshake, so that the deadline can end that too
        self.sock = self._tls.wrap_socket(
            raw, server_hostname=self.host, do_handshake_on_connect=False
        )
        self.sock.do_handshake()


def download(
    connection: http.client.HTTPConnection, target: str, max_bytes: int, timeout_s: float
) -> bytes:
    """The response to GET. Raises ValueError for anything but status 200 within the limits."""
    with contextlib.closing(connection), _Deadline(connection, timeout_s) as deadline:
        try:
            connection.request("GET", target, headers={"Accept-Encoding": "identity"})
            deadline.sock = connection.sock
            body = _body(connection.getresponse(), max_bytes)
        except (OSError, http.client.HTTPException):
            if not deadline.expired:
                raise
        if deadline.expired:
            raise ValueError(f"the remote file took more than {timeout_s:g} s")
        return body


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if 300 <= response.status < 400:
        raise ValueError("the server redirects to another place: redirects are not followed")
    if response.status != 200:
        raise ValueError(f"the server answers with status {response.status}")
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise ValueError("the server sends the file compressed, which is not supported")
    body = bytearray()
    while True:
        if max(response.length or 0, len(body)) > max_bytes:
            raise ValueError(f"the remote file has more than {max_bytes} bytes")
        chunk = response.read(CHUNK_BYTES)
        if not chunk:
            break
        body += chunk
    if response.length:  # fewer bytes than announced
        raise http.client.IncompleteRead(bytes(body), response.length)
    return bytes(body)


class _Deadline:
    """Ends a connection after `timeout_s` in all. A socket's timeout is per read, so a server that
    sends a byte from time to time would never reach it.

    sock: the socket once the request is sent; http.client may drop it while a response is read.
    """

    def __init__(self, connection: http.client.HTTPConnection, timeout_s: float) -> None:
        self.sock: socket.socket | None = None
        self.expired = False
        self._connection = connection
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.expired = True
        sock = self.sock or self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                # not the method of ssl, which changes the object that another thread reads from
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
