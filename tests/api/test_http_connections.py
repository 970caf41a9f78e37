"""Connections: pipelined, half-closed, with upgrades, with malformed requests, too many."""

from __future__ import annotations

import http.client
import json
import logging
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from nanovllm import open_files
from nanovllm.api import connection_limits
from nanovllm.api.page import files
from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import MODEL, MockServer, served
from tests.api.test_http_fuzz import HEAD, all_of, connect, request
from tests.api.test_tls import make_pair

HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
UNKNOWN = b"POST /unknown HTTP/1.1\r\nhost: localhost\r\ncontent-length: 19\r\n\r\n"
ONE_TOKEN = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(access_log=False, header_timeout=60.0) as one:
        yield one


def statuses(answers: bytes) -> list[int]:
    """Those of answers, without those that are only on the way."""
    found = [int(one) for one in re.findall(rb"HTTP/1\.1 (\d+) ", answers)]
    return [one for one in found if one != 100]


def sent(server: MockServer, *pieces: bytes, half_close: bool = True) -> bytes:
    """What the server answers to these bytes until it closes the connection."""
    with connect(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return all_of(sock)


def received(sock: socket.socket, wanted: bytes) -> bytes:
    """What comes until this is in it: an answer may come in parts."""
    found = b""
    while wanted not in found:
        piece = sock.recv(1 << 16)
        assert piece, found
        found += piece
    return found


# pipelined requests -----------------------------------------------------------------------------


@dataclass
class Watched:
    """What has happened to a server's connections."""

    connections: list[Any] = field(default_factory=list)
    num_parsed: int = 0
    num_answered: int = 0


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    found, kind = Watched(), connection_limits.LimitedProtocol
    made, parsed, answered = (
        kind.connection_made, kind.on_headers_complete, kind.on_response_complete,
    )  # fmt: skip

    def note_made(self: Any, transport: Any) -> None:
        found.connections.append(self)
        made(self, transport)

    def note_parsed(self: Any) -> None:
        found.num_parsed += 1
        parsed(self)

    def note_answered(self: Any) -> None:
        found.num_answered += 1
        answered(self)

    monkeypatch.setattr(kind, "connection_made", note_made)
    monkeypatch.setattr(kind, "on_headers_complete", note_parsed)
    monkeypatch.setattr(kind, "on_response_complete", note_answered)
    return found


def test_a_client_that_reads_no_answers_has_one_request_in_memory(
    server: MockServer, watched: Watched
) -> None:
    """And its bytes are bounded: the kernel has the others, and the client has to wait."""
    with connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(1)
        num_sent = 0
        with pytest.raises(TimeoutError):
            while num_sent < 32 << 20:
                num_sent += sock.send(HEALTH * 1000)
        while not watched.num_answered:
            time.sleep(0.001)
        assert watched.num_parsed - watched.num_answered <= 1
        (connection,) = watched.connections
        assert not connection.pipeline and len(connection._held) < 1 << 20
        assert connection.transport.get_write_buffer_size() < 1 << 20
        assert server.http.get("/health").status_code == 200, "others are served"


def test_thousands_of_pipelined_requests_are_all_answered(server: MockServer) -> None:
    answers = sent(server, HEALTH * 3000)
    assert statuses(answers) == [200] * 3000


def bodies() -> list[bytes]:
    """Requests of all forms, and an upgrade of each. None of them ends a connection."""
    content = b' \r\n\r\n{"prompt": "a",\r\n\r\n "max_tokens": 1}\r\n\r\n'
    halves = content[:19], content[19:]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in halves)
    upgrade = b"connection: Upgrade\r\nupgrade: h2c\r\n"
    return [
        HEALTH,
        HEAD + b"content-length: %d\r\n\r\n" % len(content) + content,
        b"\r\n\r\n" + HEAD + upgrade + b"content-length: %d\r\n\r\n" % len(content) + content,
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\nx: y\r\nz: a\r\n\r\n",
        HEAD + upgrade + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n",
        UNKNOWN + b"\r\n\r" * 6 + b"x",
        HEALTH,
    ]  # fmt: skip


@pytest.mark.parametrize("num_bytes", [1, 3, 19, 99, 989, 1 << 20])
def test_requests_may_be_cut_anywhere(server: MockServer, num_bytes: int) -> None:
    data = b"".join(bodies())
    pieces = [data[at : at + num_bytes] for at in range(0, len(data), num_bytes)]
    assert statuses(sent(server, *pieces)) == [200, 200, 200, 200, 200, 200, 404, 200]


def test_answers_come_before_the_next_requests_are_read(server: MockServer) -> None:
    """A head that is incomplete, or late, delays no answer before it."""
    with connect(server) as sock:
        sock.sendall(HEALTH + request(ONE_TOKEN) + b"GET /hea")
        answers = b""
        while len(statuses(answers)) < 2 or not answers.endswith(b"}"):
            answers += sock.recv(1 << 16)
        sock.sendall(b"lth HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert statuses(received(sock, b" 200 ")) == [200]
    for limit in (0.5, 5.0, 50.0):  # a busy machine may send the bytes too late
        with served(access_log=False, header_timeout=limit) as quick:
            found = statuses(sent(quick, HEALTH + b"GET /hea", half_close=False))
        if found:
            break
    assert found == [200], "and it is closed in time"


@pytest.mark.parametrize("num_requests", [1, 2])
def test_a_client_that_vanishes_with_requests_in_the_pipeline_ends_them(num_requests: int) -> None:
    body = request({"prompt": "a", "max_tokens": 999, "stream": True})
    with served(MockOptions(tokens_per_s=20)) as slow:
        with connect(slow) as sock:
            sock.sendall(body * num_requests)
            while not slow.engine.streams:
                time.sleep(0.001)
        while slow.engine.streams:
            time.sleep(0.001)
        assert slow.engine.num_aborted == 1


# half-closed connections -----------------------------------------------------------------------


def test_a_half_closed_client_gets_its_answers(server: MockServer) -> None:
    assert statuses(sent(server, request(ONE_TOKEN))) == [200]
    streamed = sent(server, request({**ONE_TOKEN, "stream": True}) + HEALTH)
    assert statuses(streamed) == [200, 200] and b"[DONE]" in streamed
    assert b" 200 " in sent(server, b"GET /health HTTP/1.0\r\n\r\n")


def test_a_half_closed_client_waits_as_long_as_others() -> None:
    """It gets 100 Continue meanwhile, which clients skip."""
    with served(MockOptions(tokens_per_s=10)) as slow:
        connection = http.client.HTTPConnection(slow.host, slow.port, timeout=60)
        headers = {"content-type": "application/json"}
        body = json.dumps({"prompt": "a", "max_tokens": 12})
        connection.request("POST", "/v1/completions", body, headers)
        connection.sock.shutdown(socket.SHUT_WR)
        answer = connection.getresponse()
        assert answer.status == 200
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 12
        connection.close()
        answers = sent(slow, request({"prompt": "a", "max_tokens": 12}))
        assert answers.startswith(connection_limits.CONTINUE) and statuses(answers) == [200]
        assert slow.engine.num_aborted == 0


def test_a_half_closed_client_of_http_1_0_gets_no_100_continue() -> None:
    """It does not know it. What it waits for is aborted, as that of a client that has left."""
    old = request({"prompt": "a", "max_tokens": 999}).replace(b"HTTP/1.1", b"HTTP/1.0")
    with served(MockOptions(tokens_per_s=10)) as slow:
        assert sent(slow, old) == b""
        while slow.engine.streams:
            time.sleep(0.001)
        assert slow.engine.num_aborted == 1


def test_a_request_that_is_cut_off_gets_no_answer(server: MockServer) -> None:
    for data in (b"GET /hea", HEAD + b"content-length: 99\r\n\r\n{"):
        assert sent(server, data) == b""
        assert statuses(sent(server, HEALTH + data)) == [200]


def test_tls_has_no_half_closed_connections(tmp_path: Any) -> None:
    pair = make_pair(tmp_path, "server")
    context = ssl.create_default_context(cafile=str(pair.certificate))
    with served(MockOptions(tokens_per_s=20), **pair.options) as secure:
        with (
            connect(secure) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(request({"prompt": "a", "max_tokens": 999}))
            while not secure.engine.streams:
                time.sleep(0.001)
        while secure.engine.streams:
            time.sleep(0.001)
        assert secure.engine.num_aborted == 1


# malformed requests -------------------------------------------------------------------------------


def error_of(answers: bytes) -> dict[str, Any]:
    """That of the last answer."""
    found: dict[str, Any] = json.loads(answers.rpartition(b"\r\n\r\n")[2])["error"]
    return found


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "malformed", [b"zz\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n\r\n", b"ffffffffffffffffff\r\n"]
)
@pytest.mark.parametrize("is_late", [False, True])
def test_a_malformed_body_gets_400(server: MockServer, malformed: bytes, is_late: bool) -> None:
    with connect(server) as sock:
        sock.sendall(CHUNKED + b"1\r\n{\r\n" + (b"" if is_late else malformed))
        if is_late:
            time.sleep(0.05)  # the application waits for the body
            sock.sendall(malformed)
        answers = all_of(sock)
    assert statuses(answers) == [400] and error_of(answers)["code"] == "invalid_http"


@pytest.mark.parametrize("garbage", [b"\x00" * 99, b"garbage\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_garbage_after_a_request_does_not_lose_its_answer(
    server: MockServer, garbage: bytes
) -> None:
    answers = sent(server, request(ONE_TOKEN) + garbage, half_close=False)
    assert statuses(answers) == [200, 400] and b'"completion_tokens":1' in answers
    assert error_of(answers)["code"] == "invalid_http"


def test_a_long_head_after_a_request_gets_431(server: MockServer) -> None:
    long = b"GET / HTTP/1.1\r\nx: " + b"y" * (40 << 10) + b"\r\n\r\n"
    assert statuses(sent(server, request(ONE_TOKEN) + long)) == [200, 431]


# upgrades ---------------------------------------------------------------------------------------

# what java.net.http.HttpClient of Java 17 sends by default, byte for byte
JAVA = (
    b"Connection: Upgrade, HTTP2-Settings\r\n%bHost: 127.0.0.1:8000\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n%bUpgrade: h2c\r\n"
    b"User-Agent: Java-http-client/17.0.15\r\n%b\r\n"
)
JAVA_BODY = b'{"prompt":"hello","max_tokens":2}'
JSON = b"Content-Type: application/json\r\n"
CHUNKS = b"Transfer-encoding: chunked\r\n"


def test_an_upgrade_of_java_is_ignored(server: MockServer) -> None:
    post = b"POST /v1/completions HTTP/1.1\r\n"
    with connect(server) as sock:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\n" + JAVA % (b"Content-Length: 0\r\n", b"", b""))
        answer = received(sock, MODEL.encode())
        assert statuses(answer) == [200]
        assert b"upgrade" not in answer.lower()
        for head, body in (
            (JAVA % (b"Content-Length: 33\r\n", b"", JSON), JAVA_BODY),
            (JAVA % (b"", CHUNKS, JSON), b"21\r\n" + JAVA_BODY + b"\r\n0\r\n\r\n"),
        ):
            for pieces in ((post + head, body), (post + head + body,)):
                for piece in pieces:
                    sock.sendall(piece)
                    time.sleep(0.01)
                answer = received(sock, b'"completion_tokens":2')
                assert statuses(answer) == [200]


@pytest.mark.parametrize("name", [b"websocket", b"h2c, websocket", b"TLS/1.0"])
def test_other_upgrades_are_ignored(server: MockServer, name: bytes) -> None:
    upgrade = b"connection: upgrade\r\nupgrade: %b\r\n\r\n" % name
    asked = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n" + upgrade
    assert statuses(sent(server, asked * 2 + HEALTH)) == [200, 200, 200]


def test_limits_hold_for_requests_with_upgrades(server: MockServer) -> None:
    upgrade = b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
    for lines in (b"x: " + b"y" * (33 << 10) + b"\r\n", b"x: y\r\n" * 200):
        assert statuses(sent(server, upgrade + lines + b"\r\n")) == [431]
    with served(access_log=False, header_timeout=0.5) as quick:
        assert sent(quick, upgrade, half_close=False) == b"", "closed in time"


def test_a_tunnel_is_refused(server: MockServer) -> None:
    for target in (b"example.org:443", b"/", b"http://localhost/"):
        asked = b"CONNECT %b HTTP/1.1\r\nhost: localhost\r\n\r\n" % target
        assert statuses(sent(server, asked + b"tunnelled")) == [400]


# time and files ----------------------------------------------------------------------------------


def test_a_connection_stays_open_after_a_body_that_was_not_needed(
    server: MockServer, watched: Watched
) -> None:
    """It waits for the next request, and not for the rest of a head."""
    with connect(server) as sock:
        sock.sendall(UNKNOWN)
        assert statuses(received(sock, b" 404 ")) == [404]
        (connection,) = watched.connections
        sock.sendall(b"x" * 19)
        while connection._is_receiving or connection.timeout_keep_alive_task is None:
            time.sleep(0.001)
        assert not connection._timers
        sock.sendall(HEALTH)
        assert statuses(received(sock, b" 200 ")) == [200]


def limited_to(soft: int, hard: int) -> Callable[[int], tuple[int, int]]:
    return lambda _: (soft, hard)


def test_connections_are_as_many_as_files_that_may_be_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", limited_to(100, 130))
    monkeypatch.setattr("resource.setrlimit", lambda _, found: limits.append(found))
    with caplog.at_level(logging.WARNING), served() as one:
        assert limits == [(130, 130)], "as many as this process may have"
        first = connect(one)
        others = [connect(one) for _ in range(2)]
        assert all_of(first) == b"", "the third one has taken its place"
        for sock in (first, *others):
            sock.close()
    assert "max_connections is 4096, but the process can have only 130 open files" in caplog.text
    assert "serving 2 connections" in caplog.text


@pytest.mark.parametrize(
    ("soft", "hard", "allowed"), [(1024, 9999, 4224), (1024, 1100, 1100), (1024, -1, 4224),
                                  (-1, -1, 4224), (5000, 5000, 4224)],
)  # fmt: skip
def test_the_limit_on_open_files_is_raised_as_far_as_it_may(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, allowed: int
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", limited_to(soft, hard))
    monkeypatch.setattr("resource.setrlimit", lambda _, found: limits.append(found))
    assert open_files.allow(4224) == allowed
    assert limits == ([] if soft in (-1, 5000) else [(allowed, hard)])


# the access log ---------------------------------------------------------------------------------


def test_the_access_log_has_no_lines_of_what_is_polled(caplog: pytest.LogCaptureFixture) -> None:
    """Unless it fails."""
    with caplog.at_level(logging.INFO), served(api_key=["a-key"], open_paths=["/"]) as one:
        key = {"authorization": "Bearer a-key"}
        for path in ("/health", "/ready", "/metrics", *files()):
            assert one.http.get(path, headers=key).status_code == 200
        assert one.http.get("/metrics").status_code == 401
        assert one.http.get("/v1/models", headers=key).status_code == 200
    lines = [json.loads(text) for text in caplog.messages if '"path"' in text]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/metrics", 401), ("/v1/models", 200),
    ]  # fmt: skip
