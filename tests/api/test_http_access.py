"""Advisories of servers of language models: who may ask, by keys, origins and hosts."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from nanovllm.api.app import ROUTES
from nanovllm.api.config import ALWAYS_OPEN, ServerConfig
from nanovllm.api.page import files
from tests.api.mock_api_server import MockServer, served
from tests.api.security_cases import KEYS, locked, server

__all__ = ["locked", "server"]  # fixtures


# missing authentication ---------------------------------------------------------------------------

PATHS = [*ROUTES, "/v1/models/x", "/v1/unknown", "/unknown", "/docs", *files()]


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", "Bearer first-ke", "Bearer first-keyy", "first-key",
               "Basic Zmlyc3Q="],
)  # fmt: skip
def test_missing_auth_every_path_but_health_needs_a_key(
    locked: MockServer, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    for path in set(PATHS) - set(ALWAYS_OPEN):
        for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
            answer = locked.http.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path)


SPELLINGS = (
    "//v1/models", "/v1/../v1/models", "/V1/models", "/health/", "/health/../metrics",
    "/%68ealth/../metrics", "/health%2f",
)  # fmt: skip


@pytest.mark.parametrize("path", SPELLINGS)
def test_missing_auth_no_spelling_of_a_path_goes_around_the_key(
    locked: MockServer, path: str
) -> None:
    with socket.create_connection((locked.host, locked.port)) as sock:
        sock.sendall(
            f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
        )
        assert b" 401 " in sock.recv(1 << 16)


def test_missing_auth_each_key_opens_and_health_needs_none(locked: MockServer) -> None:
    for key in KEYS:
        headers = {"authorization": f"Bearer {key}"}
        assert locked.http.get("/metrics", headers=headers).status_code == 200
    for path in ALWAYS_OPEN:
        assert locked.http.get(path).status_code == 200


def test_missing_auth_keys_are_not_in_texts_of_the_options() -> None:
    config = ServerConfig(api_key=KEYS)
    assert not any(key in f"{config} {config!r}" for key in KEYS)
    with pytest.raises(ValueError, match="secret") as caught:
        ServerConfig(api_key="a single text\n")  # type: ignore[arg-type]
    assert "single" not in str(caught.value)


def test_missing_auth_pages_of_other_origins_read_nothing(server: MockServer) -> None:
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for method in ("GET", "OPTIONS", "POST"):
        answer = server.http.request(method, "/v1/models", headers=origin)
        assert not any(name.startswith("access-control") for name in answer.headers)
    # without a content type that a browser must ask about, a page could at least send
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.http.post(
            "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind}
        )
        assert answer.status_code == 415


def test_missing_auth_an_allowed_origin_alone_may_read() -> None:
    with served(allowed_origins=["https://good.example"]) as open_one:
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            answer = open_one.http.get("/v1/models", headers={"origin": origin})
            assert ("access-control-allow-origin" in answer.headers) is allowed


# what the npm package openai sends from a browser
STAINLESS = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,"
    "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
    "x-stainless-runtime-version,x-stainless-timeout"
)


@pytest.mark.parametrize("origins", [["https://good.example"], ["*"]])
def test_missing_auth_scripts_of_an_allowed_origin_send_headers_of_their_own(
    origins: list[str],
) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": STAINLESS}
    with served(allowed_origins=origins, api_key=["a-key"]) as one:
        for origin in ("https://good.example", "https://evil.example"):
            is_allowed = origin in origins or "*" in origins
            headers = {"origin": origin, **asked}
            answer = one.http.options("/v1/chat/completions", headers=headers)
            assert (answer.status_code == 200) is is_allowed
            if is_allowed:
                given = answer.headers["access-control-allow-headers"]
                assert set(STAINLESS.split(",")) <= set(given.replace(" ", "").split(","))
                answer = one.http.get("/v1/models", headers={"origin": origin})
                assert answer.status_code == 401 and "x-request-id" in answer.headers
                exposed = answer.headers["access-control-expose-headers"]
                assert "x-request-id" in exposed and "retry-after" in exposed


# DNS rebinding --------------------------------------------------------------------------------

LOCAL = (
    "localhost", "LocalHost:8000", "localhost.", "127.0.0.1", "127.9.9.9:1", "[::1]:8000",
    "[::ffff:127.0.0.1]",
)  # fmt: skip
FOREIGN = (
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
    "evil.example@localhost", "localhost:8000@evil.example", "localhost evil.example", "192.0.2.1",
    "0.0.0.0", "[2001:db8::1]", "[::1", "::1", "", "*", "a" * 10_000,
)  # fmt: skip


def raw(server: MockServer, path: str, hosts: Sequence[str]) -> tuple[int, bytes]:
    """The status and the answer of a request with these headers Host."""
    lines = [f"GET {path} HTTP/1.1", *(f"Host: {one}" for one in hosts), "Connection: close"]
    with socket.create_connection((server.host, server.port), timeout=60) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        with sock.makefile("rb") as file:
            answer = file.read()
    return int(answer.split()[1]), answer


@pytest.mark.parametrize("path", sorted({*PATHS} - {*ALWAYS_OPEN}))
def test_dns_rebinding_on_loopback_every_path_refuses_a_foreign_host(
    server: MockServer, path: str
) -> None:
    """The error is the server's usual one and names the option."""
    status, answer = raw(server, path, ["evil.example:8000"])
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert status == 421 and error.get("code", "unknown_host") == "unknown_host"
    assert "'evil.example:8000'" in error["message"] and "allowed_hosts" in error["message"]


def test_dns_rebinding_no_spelling_of_a_foreign_host_is_taken_for_a_local_one(
    server: MockServer,
) -> None:
    for host in FOREIGN:
        assert raw(server, "/v1/models", [host])[0] == 421, host
    for hosts in ([], ["localhost", "evil.example"], ["evil.example", "localhost"]):
        assert raw(server, "/v1/models", hosts)[0] == 421, hosts


def test_dns_rebinding_names_of_loopback_stay_allowed_with_any_port(server: MockServer) -> None:
    for host in LOCAL:
        assert raw(server, "/v1/models", [host])[0] == 200, host


def test_dns_rebinding_probes_of_health_may_use_any_address_or_none(server: MockServer) -> None:
    for path in ALWAYS_OPEN:
        for hosts in (["10.1.2.3:8000"], ["evil.example"], []):
            assert raw(server, path, hosts)[0] == 200, (path, hosts)


@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        ({"allowed_hosts": ["Api.example.org", "[2001:db8::1]"]},
         ["api.example.org", "API.example.org.:443", "[2001:DB8::1]:8000", "localhost"],
         ["example.org", "x.api.example.org"]),
        ({"allowed_hosts": ["2001:db8:0:0::1"]}, ["[2001:db8::1]"], ["[2001:db8::2]"]),
        ({"allowed_hosts": ["."]}, ["localhost"], ["", ".", "localhost evil.example"]),
        ({"allowed_hosts": ["*"]}, ["evil.example", ""], []),
        ({"host": "0.0.0.0"}, ["evil.example", "192.0.2.1:8000"], []),
        ({"host": "0.0.0.0", "allowed_hosts": ["api.example.org"]},
         ["api.example.org", "0.0.0.0:8000", "127.0.0.1"], ["evil.example", "192.0.2.1"]),
        ({"host": "127.0.0.2"}, ["127.0.0.2"], ["evil.example"]),
        ({"host": "localhost"}, ["localhost"], ["evil.example"]),
    ],
    ids=str,
)  # fmt: skip
def test_dns_rebinding_hosts_are_those_of_the_option_and_of_the_address(
    options: dict[str, Any], allowed: list[str], refused: list[str]
) -> None:
    with served(**options) as one:
        for host in allowed:
            assert raw(one, "/v1/models", [host])[0] == 200, host
        for host in refused:
            assert raw(one, "/v1/models", [host])[0] == 421, host
