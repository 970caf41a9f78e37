"""TLS: the official client, plain HTTP on its port, files that are no certificate or key."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from nanovllm.cli.main import run
from nanovllm.tools import command_line
from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import MODEL, MockServer, served
from tests.api.test_http_fuzz import all_of, request

PASSPHRASE = "a passphrase"


class Pair(NamedTuple):
    """The files of a certificate for 127.0.0.1 and of its key."""

    certificate: Path
    key: Path

    @property
    def options(self) -> dict[str, Any]:
        return {"ssl_certfile": self.certificate, "ssl_keyfile": self.key}


def make_pair(folder: Path, name: str) -> Pair:
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    words = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    )
    command = [*words.split(), "-out", str(pair.certificate), "-keyout", str(pair.key)]
    subprocess.run(command, check=True, capture_output=True)
    return pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"), "server")


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[MockServer]:
    with served(**pair.options) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: MockServer, pair: Pair) -> Iterator[openai.OpenAI]:
    trusted = ssl.create_default_context(cafile=str(pair.certificate))
    with httpx.Client(verify=trusted) as http, server.client(http_client=http) as one:
        yield one


def test_the_official_client_gets_whole_and_streamed_answers(
    server: MockServer, client: openai.OpenAI
) -> None:
    assert server.url.startswith("https://")
    asked: Any = {"model": MODEL, "prompt": "hello", "seed": 9, "max_tokens": 99}
    whole = client.completions.create(**asked).choices[0].text
    chunks = list(client.completions.create(**asked, stream=True))
    assert len(chunks) > 1 and "".join(one.choices[0].text for one in chunks) == whole


def test_a_client_that_does_not_trust_the_certificate_sends_nothing(server: MockServer) -> None:
    with server.client() as one, pytest.raises(openai.APIConnectionError):
        one.models.list()


@pytest.mark.parametrize(
    "sent", [b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n", b"\x16\x03\x01\xff", b""]
)
def test_what_is_no_tls_gets_no_answer_and_does_no_harm(
    server: MockServer, client: openai.OpenAI, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        socket.create_connection((server.host, server.port), timeout=60) as sock,
    ):
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(1 << 16):
            answer += part
    assert b"HTTP" not in answer, "TLS may send an alert"
    assert not caplog.messages
    assert client.models.list().data[0].id == MODEL


def connect(server: MockServer) -> socket.socket:
    """A connection that waits for half as long as a handshake may take by default."""
    return socket.create_connection((server.host, server.port), timeout=30)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_a_handshake_that_does_not_end_is_closed_in_time(pair: Pair, sent: bytes) -> None:
    with served(**pair.options, header_timeout=0.5) as quick, connect(quick) as sock:
        sock.sendall(sent)
        all_of(sock)  # else it would wait for too long, which is an error


def test_connections_count_from_before_the_handshake(pair: Pair) -> None:
    """And a new one replaces the longest idle one."""
    trusted = ssl.create_default_context(cafile=str(pair.certificate))
    with (
        served(**pair.options, header_timeout=60.0, max_connections=3) as one,
        httpx.Client(verify=trusted, base_url=one.url, timeout=60) as http,
        ExitStack() as stack,
    ):
        socks = [stack.enter_context(connect(one)) for _ in range(5)]
        assert [all_of(sock) for sock in socks[:2]] == [b"", b""]
        assert http.get("/health").status_code == 200
        assert all_of(socks[2]) == b""


def test_a_connection_is_closed_if_all_others_have_requests(pair: Pair) -> None:
    trusted = ssl.create_default_context(cafile=str(pair.certificate))
    body = request({"prompt": [5], "max_tokens": 999, "stream": True})
    with (
        served(MockOptions(tokens_per_s=5), **pair.options, max_connections=1) as slow,
        connect(slow) as plain,
        trusted.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
    ):
        sock.sendall(body)
        while not slow.engine.streams:
            time.sleep(0.001)
        with connect(slow) as other:
            assert all_of(other) == b""
        assert b" 200 " in sock.recv(1 << 16)


def test_wrong_files_are_one_line_at_the_start(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, text, locked = (tmp_path / name for name in ("missing.pem", "text.pem", "locked.pem"))
    text.write_text("no certificate")
    encrypt = ["openssl", "ec", "-aes256", "-passout", f"pass:{PASSPHRASE}", "-out", str(locked)]
    subprocess.run([*encrypt, "-in", str(pair.key)], check=True, capture_output=True)
    other = make_pair(tmp_path, "other")
    for certificate, key, words in (
        (missing, pair.key, f"ssl_certfile is '{missing}': No such file or directory"),
        (pair.certificate, missing, f"ssl_keyfile is '{missing}': No such file or directory"),
        (tmp_path, pair.key, f"ssl_certfile is '{tmp_path}': Is a directory"),
        (text, pair.key, "not a certificate and its key in PEM form"),
        (pair.certificate, text, "not a certificate and its key in PEM form"),
        (pair.certificate, other.key, "not a certificate and its key in PEM form"),
        (pair.certificate, locked, f"ssl_keyfile is '{locked}': a key with a passphrase"),
    ):
        given = [MODEL, "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
        assert command_line.run(lambda given=given: run("serve", given)) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and words in printed, printed
