"""Anything may come over the wire: no 5xx, no hang, bounded memory, and the server goes on."""

from __future__ import annotations

import json
import random
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from nanovllm.api import openapi
from nanovllm.api.service import Service
from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import TEMPLATE, MockServer, served

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LIMITS: dict[str, Any] = {
    "max_body_bytes": 4 << 20, "max_header_bytes": 4096, "max_connections": 1100,
    "header_timeout": 60.0, "access_log": False,
}  # fmt: skip
# of the tests of these limits alone: a busy machine delays the bytes of other clients for longer
SHORT = {"header_timeout": 1.0, "body_timeout": 1.0, "send_timeout": 1.0}
WAIT_S = 60.0  # for what takes milliseconds on an idle machine
QUICK = settings(
    max_examples=10, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(MockOptions(max_model_len=64), TEMPLATE, **LIMITS) as one:
        yield one


@pytest.fixture(autouse=True)
def _goes_on(server: MockServer) -> Iterator[None]:
    """After each test nothing runs, and the server answers."""
    yield
    assert ends_all(server), "requests of clients that are gone run"
    answer = server.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1})
    assert answer.status_code == 200


def ends_all(server: MockServer) -> bool:
    """Whether all requests end in time."""
    deadline = time.monotonic() + WAIT_S
    while server.engine.streams and time.monotonic() < deadline:
        time.sleep(0.001)
    return not server.engine.streams


def connect(server: MockServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=WAIT_S)


def request(body: Any) -> bytes:
    content = json.dumps(body).encode()
    return HEAD + b"content-length: %d\r\n\r\n%b" % (len(content), content)


def all_of(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    found = b""
    try:
        while piece := sock.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_requests_made_from_the_description_give_no_server_error(
    server: MockServer, mode: schemathesis.GenerationMode
) -> None:
    document = openapi.description(Service(server.engine, server.config))
    schema = schemathesis.openapi.from_dict(document)
    num_calls = 0

    def send(case: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        answer = case.call(base_url=server.url, timeout=WAIT_S)
        assert answer.status_code < 500 and answer.status_code != 422
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.method != "post":
            continue
        QUICK(given(case=operation.as_strategy(mode))(send))()
    assert num_calls > 40


def test_bytes_that_are_no_request_end_their_connection_alone(server: MockServer) -> None:
    rng = random.Random(19)
    for num_bytes in (1, 19, 99, 989, 9999):
        for head in (b"", HEAD, HEAD + b"content-length: 5\r\n\r\n"):
            with connect(server) as sock:
                sock.sendall(head + rng.randbytes(num_bytes))
                sock.shutdown(socket.SHUT_WR)
                answer = all_of(sock)
                assert not answer or answer.split()[1][:1] == b"4"


@pytest.mark.parametrize(
    "body",
    [b"", b"[" * 10**6, b'{"a":' * 10**5, b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud800"}',
     b'{"prompt": NaN}', b'{"prompt": 1' + b"0" * 10**5 + b"}", b'"' + b"x" * 10**6,
     b'{"prompt": "a", "n": ' + b"9" * 400 + b"}", b"\x00" * 999],
    ids=range(10),
)  # fmt: skip
def test_json_that_is_none_gets_400(server: MockServer, body: bytes) -> None:
    kind = {"content-type": "application/json"}
    answer = server.http.post("/v1/completions", content=body, headers=kind)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b'{"messages": [{"role": %b, "content": "Hi"}]}',
     b'{"messages": [{"role": "user", "content": "Hi"}], "structured_outputs": {"regex": %b}}',
     b'{"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"a": %b}}'],
    ids=range(3),
)  # fmt: skip
def test_a_wrong_value_of_any_depth_gets_400(server: MockServer, body: bytes) -> None:
    """From some depth on it could be read, and not be printed any more."""
    kind = {"content-type": "application/json"}
    for depth in (1, 19, 99, 505, *range(960, 1000)):
        content = body % (b"[" * depth + b"]" * depth)
        answer = server.http.post("/v1/chat/completions", content=content, headers=kind)
        # a variable that the template does not read is left out
        is_left_out = b"chat_template_kwargs" in body and depth <= 512
        assert answer.status_code == (200 if is_left_out else 400), (depth, answer.text)
        assert ("too deeply" in answer.text) == (depth > 512), depth


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("place", ["next request", "after the body", "chunk"])
def test_headers_are_bounded_wherever_they_come(server: MockServer, place: str) -> None:
    """Those of the next request are not even received before the answer is complete."""
    with served(MockOptions(tokens_per_s=5), **LIMITS) as slow, connect(slow) as sock:
        body = {"prompt": "a", "max_tokens": 999, "stream": True}
        head = {
            "next request": request(body) + b"GET / HTTP/1.1\r\nx: ",
            "after the body": CHUNKED + b"0\r\nx: ",
            "chunk": CHUNKED + b"1;",
        }[place]
        sock.sendall(head)
        if place == "next request":
            assert b" 200 " in sock.recv(1 << 16)
            sock.settimeout(1)
        num_sent = 0
        with pytest.raises(TimeoutError if place == "next request" else ConnectionError):
            while num_sent < 16 << 20:
                num_sent += sock.send(b"x" * 4096)
        assert num_sent < 16 << 20


def test_a_body_may_come_in_small_chunks_and_what_follows_is_no_header(server: MockServer) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * 8192}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % one for one in body)
    with connect(server) as sock:
        sock.sendall(CHUNKED + chunks + b"0\r\nhost: evil.example\r\n\r\n")
        assert b" 200 " in sock.recv(1 << 16).split(b"\r\n")[0] + b" "


def test_a_body_of_50_mb_is_not_kept(server: MockServer) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def pieces() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * (1 << 20)

    for content in (b"x" * (15 << 20), pieces()):
        kind = {"content-type": "application/json"}
        try:
            answer = server.http.post("/v1/completions", content=content, headers=kind)
            assert answer.status_code == 413
        except httpx.TransportError:
            pass  # far too long: the connection is closed, whoever still sends
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 48 << 10, f"{grown >> 10} MiB more"


def test_a_million_stop_strings_are_refused(server: MockServer) -> None:
    start = time.process_time()
    answer = server.http.post(
        "/v1/completions", json={"prompt": "a", "stop": ["x"] * 10**6}, timeout=WAIT_S
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stop"
    for stop in (["x"] * 10**5, ["x" * 10**5]):
        answer = server.http.post("/v1/completions", json={"prompt": "a", "stop": stop})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "stop"
    assert time.process_time() - start < 5


def test_a_client_that_vanishes_ends_its_requests(server: MockServer) -> None:
    with served(MockOptions(tokens_per_s=20)) as slow:
        for body in ({"prompt": ["a", "b"], "n": 2, "stream": True}, {"prompt": "a"}):
            num = slow.engine.num_aborted
            with connect(slow) as sock:
                sock.sendall(request({**body, "max_tokens": 999}))
                while not slow.engine.streams:
                    time.sleep(0.001)
                num_streams = len(slow.engine.streams)
            assert ends_all(slow) and slow.engine.num_aborted == num + num_streams


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", HEAD, HEAD + b"content-length: 99\r\n\r\n{"], ids=range(4)
)
def test_a_half_open_connection_is_closed_in_time(sent: bytes) -> None:
    with served(**{**LIMITS, **SHORT}) as quick:
        start = time.monotonic()
        with connect(quick) as sock:
            sock.sendall(sent)
            all_of(sock)  # else it would wait for WAIT_S, which is an error
        assert time.monotonic() - start > 0.9, "not before the end of a second"


def test_a_reader_that_stops_holds_no_request(server: MockServer) -> None:
    """Its answers go on to their end, in few large parts, or it is disconnected."""
    made_up = MockOptions(max_model_len=10**6)
    with served(made_up, **{**LIMITS, **SHORT, "send_timeout": 0.5}) as fast, connect(fast) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(request({"prompt": "a", "max_tokens": 200_000, "stream": True}))
        while not fast.engine.streams:
            time.sleep(0.001)
        assert ends_all(fast)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Enough file descriptors for both ends of a thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_connections_are_served_and_more_replace_idle_ones(
    server: MockServer, many_files: None
) -> None:
    with ExitStack() as stack:
        socks = [stack.enter_context(connect(server)) for _ in range(1000)]
        body = request({"prompt": [5], "max_tokens": 1})
        for sock in socks:
            sock.sendall(body)
        assert all(b" 200 " in sock.recv(1 << 16).split(b"\r\n")[0] + b" " for sock in socks)
        more = [stack.enter_context(connect(server)) for _ in range(150)]
        more[-1].sendall(body)
        assert b" 200 " in more[-1].recv(1 << 16)
        assert not all_of(socks[0]), "the one that has been idle for the longest time is closed"
        socks[-1].sendall(body)
        assert b" 200 " in socks[-1].recv(1 << 16)


def test_a_connection_is_refused_if_all_others_have_requests() -> None:
    made_up = MockOptions(tokens_per_s=5)
    with served(made_up, max_connections=3) as slow, ExitStack() as stack:
        socks = [stack.enter_context(connect(slow)) for _ in range(3)]
        for num, sock in enumerate(socks, 1):
            sock.sendall(request({"prompt": [5], "max_tokens": 999, "stream": True}))
            while len(slow.engine.streams) < num:
                time.sleep(0.001)
        assert b" 503 " in all_of(stack.enter_context(connect(slow)))
        assert len(slow.engine.streams) == 3


def test_a_slow_head_keeps_no_other_client_out() -> None:
    """Connections that have sent a part of a head are as idle as those that have sent nothing."""
    with served(max_connections=3, header_timeout=60.0) as one, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(one)).sendall(b"GET /health HTTP/1.1\r\nx: ")
        sock = stack.enter_context(connect(one))
        sock.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert b" 200 " in sock.recv(1 << 16)


def test_headers_that_are_too_long_or_too_many_are_refused(server: MockServer) -> None:
    for line in (b"x: " + b"y" * 5000 + b"\r\n", b"x: y\r\n" * 200):
        with connect(server) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + line + b"\r\n")
            assert b" 431 " in all_of(sock)


def test_pipelined_requests_are_answered_in_their_order(server: MockServer) -> None:
    with connect(server) as sock:
        asked = [request({"prompt": "a", "max_tokens": num}) for num in (3, 1, 2)]
        last = b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        sock.sendall(b"".join(asked) + last)
        answer = all_of(sock)
    counts = [int(one.split(b",")[0]) for one in answer.split(b'"completion_tokens":')[1:]]
    assert counts == [3, 1, 2] and b'"version"' in answer
