"""Remote files: which hosts and addresses, and what an answer may be."""

from __future__ import annotations

import contextlib
import http.client
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nanovllm.media import fetch

Answer = Callable[[Any], None]
PRIVATE = [
    "127.0.0.1", "127.8.9.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "::", "::1",
    "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0::1",
    "2001:db8::1", "", "fec0::1", "feff::1", "192.0.0.1", "192.0.0.9", "192.0.0.255", "192.88.99.1",
    "192.0.2.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "100.127.255.255", "0.1.2.3",
    "192.31.196.1", "192.52.193.1", "192.175.48.1", "239.1.2.3", "172.31.255.255",
    "::ffff:0:7f00:1", "::7f00:1", "::8.8.8.8", "100::1", "64:ff9b:1::1", "64:ff9b::c058:6301",
    "::ffff:192.0.0.1",
    "2001:1::1", "2001:2::1", "2001:20::1", "2002:808:808::1", "2620:4f:8000::1", "3fff::1",
    "4000::1", "5f00::1", "ff0e::1", "2606:4700:4700::1111%eth0", "0x7f.1", "127.1", "2130706433",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808",
          "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "172.15.255.255",
          "172.32.0.0", "191.255.255.255", "192.0.1.0", "192.88.98.255", "192.88.100.0",
          "198.17.255.255", "198.20.0.0", "223.255.255.255", "2001:200::1", "2003::1",
          "2a00:1450:4001:81b::200e"]  # fmt: skip
DOMAINS = ("images.example.com", "other.example.com:8443")


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[Any]:
    """Makes every host have these addresses. Returns the list of asked hosts."""
    asked: list[Any] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append((host, port))
        return [(None, None, None, "", (one, port)) for one in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not fetch.is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address: str) -> None:
    assert fetch.is_public(address)


def test_a_host_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolves_to(monkeypatch, "8.8.8.8", "10.0.0.7")
    with pytest.raises(ValueError, match="not public") as caught:
        fetch.fetch("https://images.example.com/a.png", DOMAINS, 100, 1)
    assert "10.0" not in str(caught.value) and "example" not in str(caught.value)


def test_the_connection_goes_to_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = resolves_to(monkeypatch, "8.8.8.8")
    connected: list[Any] = []

    def connect(address: Any, *_: Any) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError("8.8.8.8 refuses")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ValueError) as caught:
        fetch.fetch("https://other.example.com:8443/a.png?b=c", DOMAINS, 100, 1)
    assert str(caught.value) == "the remote file cannot be read"
    assert asked == [("other.example.com", 8443)] and connected == [("8.8.8.8", 8443)]


def test_the_certificate_must_be_the_hosts() -> None:
    connection = fetch.PinnedConnection("images.example.com", 443, "8.8.8.8", 1)
    assert connection._tls.check_hostname and connection._tls.verify_mode.name == "CERT_REQUIRED"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://images.example.com/a", "not https"),
        ("https://example.com/a", "not in allowed_media_domains"),
        ("https://images.example.com.evil.net/a", "not in allowed_media_domains"),
        ("https://evil.net/images.example.com", "not in allowed_media_domains"),
        ("https://images.example.com:8443/a", "not in allowed_media_domains"),
        ("https://other.example.com/a", "not in allowed_media_domains"),
        ("https://images.example.com./a", "not in allowed_media_domains"),
        ("https://a:b@images.example.com/a", "user name or password"),
        ("https://images.example.com@evil.net/a", "user name or password"),
        ("https://evil.net\\@images.example.com/a", "control characters"),
        ("https://images.example.com/a\r\nHost: x", "control characters"),
        ("https://images.example.com:port/a", "cannot be read"),
        ("https://[images.example.com/a", "cannot be read"),
        ("https:///a", "not in allowed_media_domains"),
        ("https://127.0.0.1/a", "not in allowed_media_domains"),
    ],
)
def test_other_urls_are_refused_before_any_look_up(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolves_to(monkeypatch, "8.8.8.8")
    with pytest.raises(ValueError, match=message) as caught:
        fetch.fetch(url, DOMAINS, 100, 1)
    assert asked == [] and "example" not in str(caught.value)


def test_an_address_must_be_public_even_if_it_is_allowed() -> None:
    with pytest.raises(ValueError, match="not public"):
        fetch.fetch("https://127.0.0.1/a", ("127.0.0.1",), 100, 1)


def test_hosts_are_compared_without_case(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolves_to(monkeypatch)
    for url, domain in (("https://IMAGES.example.com", "images.example.COM"),):
        with pytest.raises(ValueError, match="not public"):
            fetch.fetch(url, (domain,), 100, 1)
    assert asked == [("images.example.com", 443)]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], int]]:
    """Starts a server on this machine that answers every request in one way."""
    servers: list[socketserver.ThreadingTCPServer] = []

    def start(answer: Answer) -> int:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while self.rfile.readline().strip():
                    pass
                with contextlib.suppress(OSError):
                    answer(self.wfile)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def download(port: int, max_bytes: int = 1000, timeout_s: float = 20) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    return fetch.download(connection, "/a", max_bytes, timeout_s)


def plain(body: bytes, head: str = "200 OK", *lines: str) -> Answer:
    text = "\r\n".join([f"HTTP/1.1 {head}", *lines, "Connection: close", "", ""])
    return lambda out: out.write(text.encode() + body)


@pytest.mark.parametrize("num", [0, 1, 999, 1000])
def test_a_file_within_the_limits_is_read(serve: Any, num: int) -> None:
    body = bytes(num)
    assert download(serve(plain(body, "200 OK", f"Content-Length: {num}"))) == body
    assert download(serve(plain(body))) == body


@pytest.mark.parametrize("lines", [("Content-Length: 1001",), (), ("Content-Length: 99999999999",)])
def test_a_file_above_the_limit_is_refused(serve: Any, lines: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        download(serve(plain(bytes(1001), "200 OK", *lines)))


def test_an_endless_file_is_refused(serve: Any) -> None:
    def endless(out: Any) -> None:
        out.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            out.write(bytes(1 << 16))

    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        download(serve(endless), 1000000)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(serve: Any, status: int) -> None:
    answer = plain(b"", f"{status} Moved", "Location: https://elsewhere.example.com/")
    with pytest.raises(ValueError, match="redirects are not followed") as caught:
        download(serve(answer))
    assert "elsewhere" not in str(caught.value)


@pytest.mark.parametrize("status", [204, 400, 404, 500])
def test_other_statuses_are_errors(serve: Any, status: int) -> None:
    with pytest.raises(ValueError, match=f"status {status}"):
        download(serve(plain(b"", f"{status} Oh")))


def test_a_compressed_answer_is_refused(serve: Any) -> None:
    with pytest.raises(ValueError, match="compressed"):
        download(serve(plain(b"x", "200 OK", "Content-Encoding: gzip")))


def test_a_file_that_ends_early_is_an_error(serve: Any) -> None:
    with pytest.raises(http.client.HTTPException):
        download(serve(plain(b"abc", "200 OK", "Content-Length: 99")))


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_slow_server_meets_the_deadline(serve: Any, start: bytes) -> None:
    """Each byte comes in time for the socket, but the file as a whole does not."""

    def drip(out: Any) -> None:
        out.write(start)
        while True:
            out.write(b"a")
            time.sleep(0.05)

    port = serve(drip)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"took more than 0\.5 s"):
        download(port, timeout_s=0.5)
    assert time.monotonic() - begin < 60
