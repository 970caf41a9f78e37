"""The HTTP client: events however they are cut, answers that end too early, connections."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nanovllm.cli import http
from nanovllm.cli.http import Address, Broken, HttpClient
from tests.cli.mock_server import serving

BODY = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": 7, "stream": True}
PATH = "/v1/completions"


@contextmanager
def answering(*writes: bytes, times: int = 1) -> Iterator[str]:
    """A server that answers each of `times` connections with these bytes and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            for _ in range(times):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    for data in writes:
                        connection.sendall(data)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)


def ask(url: str, *, wants_events: bool = True) -> tuple[http.HttpResponse, list[bytes]]:
    """An answer and its events."""
    client, events = HttpClient(url), list[bytes]()
    request = client.request(PATH, BODY)
    answer = http.run(client.send(request, events.append if wants_events else None))
    return answer, events


@pytest.mark.parametrize("splits", [0, 1, 7, 99])
def test_events_are_whole_however_their_bytes_are_cut(splits: int) -> None:
    with serving(splits=splits, answer='é "data: x" ') as mock:
        answer, events = ask(mock.url)
    assert answer == (200, b"") and len(events) == 7
    for event in events:
        assert json.loads(event)["choices"][0]["text"] == 'é "data: x" '


def test_connections_stay_open_between_requests() -> None:
    async def several(url: str) -> None:
        client = HttpClient(url)
        for num in (1, 3, 2):
            requests = [client.request(PATH, BODY)] * num
            await asyncio.gather(*(client.send(one, lambda data: None) for one in requests))
        client.close()

    with serving() as mock:
        http.run(several(mock.url))
    assert mock.num_connections == 3 and len(mock.bodies) == 6


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@pytest.mark.parametrize(
    "writes",
    [
        (HEAD + b"\r\ndata: 1\r\n\r\nda", b"ta: 2\n\n: a comment\n\ndata: [DONE]\n\n"),
        (HEAD + b"Content-Length: 18\r\n\r\ndata:1\n\n", b"data: 2\n\n\n"),
        (HEAD.replace(b"C", b"c") + b"TRANSFER-ENCODING: Chunked\r\n\r\n5;x=y\r\ndata: \r\n",
         b"B\r\n1\n\ndata: 2\n\r", b"\n1\r\n\n\r\n0\r\nTrailer: x\r\n\r\n"),
    ],
)  # fmt: skip
def test_bodies_of_every_framing_are_read(writes: tuple[bytes, ...]) -> None:
    with answering(*writes) as url:
        answer, events = ask(url)
    assert answer.status == 200 and events == [b"1", b"2"]


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ((), "closed the connection before the end"),
        ((HEAD,), "closed the connection before the end"),
        ((HEAD + b"Content-Length: 9\r\n\r\ndata: 1",), "before the end"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n",), "before the end"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\ndata: 1\n\n\r\n",), "is not HTTP"),
        ((b"SSH-2.0-OpenSSH\r\n\r\n",), "is not HTTP"),
        ((b"x" * 70_000,), "its head is too long"),
    ],
)
def test_an_answer_that_is_cut_or_no_http_is_an_error(
    writes: tuple[bytes, ...], message: str
) -> None:
    with answering(*writes) as url, pytest.raises(Broken, match=message):
        ask(url)


@pytest.mark.parametrize("seconds", [0, 0.05])  # before and after the client has noticed
def test_an_idle_connection_that_the_server_has_closed_is_replaced(seconds: float) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def twice(url: str) -> list[http.HttpResponse]:
        client = HttpClient(url)
        first = await client.send(client.request("/"))
        await asyncio.sleep(seconds)
        return [first, await asyncio.wait_for(client.send(client.request("/")), 60)]

    with answering(answer, times=2) as url:
        assert http.run(twice(url)) == [(200, b"{}")] * 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long", "param": "prompt"}}', "returned 400: too long"),
        (b'{"detail": "Not Found"}', "returned 400: Not Found"),
        (b'{"error": "plain"}', "returned 400: plain"),
        (b"<html>", "returned 400: <html>"),
        (b"", "returned 400: an empty response"),
    ],
)
def test_errors_have_the_server_s_message(body: bytes, message: str) -> None:
    head = b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(body)
    with answering(head + body) as url, pytest.raises(ValueError, match=message):
        ask(url)[0].checked()


def test_keys_are_sent_and_checked() -> None:
    with serving(api_key="secret") as mock:
        assert http.run(HttpClient(mock.url, "secret").get("/v1/models"))["data"] == [
            {"id": "mock"}
        ]
        with pytest.raises(ValueError, match="the server returned 401: no such key"):
            http.run(HttpClient(mock.url).get("/v1/models"))
    for key in ("a\r\nHost: b", "é"):
        with pytest.raises(ValueError, match="must be printable ASCII"):
            HttpClient("http://a", key)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("localhost:80", Address("localhost", 80, "", False)),
        ("http://a/", Address("a", 80, "", False)),
        ("https://a.b/x/y/", Address("a.b", 443, "/x/y", True)),
        ("http://[::1]:9", Address("::1", 9, "", False)),
        ("http://a/x/v1/", Address("a", 80, "/x", False)),
    ],
)
def test_urls_are_read(url: str, address: Address) -> None:
    assert Address.of(url) == address


@pytest.mark.parametrize("url", ["", "ftp://a", "http://", "http://a:x", "http://a:99999", "a?b=c"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not a (server's )?URL"):
        Address.of(url)


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    client = HttpClient(f"http://127.0.0.1:{port}")
    with pytest.raises(OSError, match=f"'127.0.0.1', port {port}: .*(refused|failed)"):
        asyncio.run(client.get("/v1/models"))
