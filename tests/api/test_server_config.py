"""The server's options are checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest

from nanovllm.api.address import bind
from nanovllm.api.config import ServerConfig

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"port": 65536}, "port is 65536: it must be a whole number, 0 … 65535"),
    ({"host": ""}, "host is ''"),
    ({"api_key": "not-a-list"}, "api_key is secret: it must be a list of keys"),
    ({"api_key": ["ok", "line\nbreak"]}, "api_key is secret"),
    ({"api_key": [""]}, "api_key is secret"),
    ({"open_paths": ["metrics"]}, "open_paths is .*begin with '/'"),
    ({"api_processes": 0}, "api_processes is 0: it must be a whole number, at least 1"),
    ({"max_n": 0}, "max_n is 0"),
    ({"max_stop_strings": -1}, "max_stop_strings is -1"),
    ({"drain_timeout": float("inf")}, "drain_timeout is inf"),
    ({"header_timeout": 0}, "header_timeout is 0"),
    ({"max_body_bytes": 1.5}, "max_body_bytes is 1.5"),
    ({"ssl_certfile": "cert.pem"}, "ssl_certfile and ssl_keyfile must be given together"),
    ({"allowed_hosts": ["example.org:8000"]}, "allowed_hosts is .*without ports"),
    ({"allowed_hosts": ["127.0.0.1:8000"]}, "allowed_hosts is .*without ports"),
    ({"allowed_hosts": ["https://example.org"]}, "allowed_hosts is .*without ports"),
    ({"allowed_hosts": ["*.example.org"]}, "allowed_hosts is .*without ports"),
    ({"allowed_hosts": [""]}, "allowed_hosts is .*names or addresses"),
    ({"access_log": "yes"}, "access_log is 'yes'"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=[next(iter(one)) for one, _ in WRONG])
def test_a_wrong_value_is_named_with_its_limit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServerConfig.from_options(options)


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "file:///etc/passwd", "http://", "http://["])
def test_an_endpoint_of_traces_must_be_a_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"otlp_traces_endpoint is .*: it must be a URL of http"):
        ServerConfig(otlp_traces_endpoint=url)


def test_an_address_that_cannot_be_had_is_named() -> None:
    with bind(ServerConfig(port=0)) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        words = f"cannot listen at host '127.0.0.1', port {port}: Address already in use"
        with pytest.raises(OSError, match=words):
            bind(ServerConfig(port=port))
    with pytest.raises(OSError, match=r"cannot listen at host '192.0.2.1', port 0: "):
        bind(ServerConfig(host="192.0.2.1", port=0))


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="unknown option prot"):
        ServerConfig.from_options({"prot": 80})


def test_the_server_is_closed_to_others_unless_told_otherwise() -> None:
    config = ServerConfig()
    assert config.host == "127.0.0.1" and not config.allowed_origins and not config.log_prompts


def test_every_option_is_described() -> None:
    text = ServerConfig.__doc__ or ""
    for field in dataclasses.fields(ServerConfig):
        assert f" {field.name}:" in text or f" {field.name}," in text, field.name


def test_a_model_has_the_name_of_its_folder_or_the_given_ones(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    folder = str(tmp_path / "checkpoint")
    assert ServerConfig().model_names("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B",)
    assert ServerConfig().model_names(folder) == ServerConfig().model_names(folder + "/")
    assert ServerConfig(served_model_name=["a", "b"]).model_names(folder) == ("a", "b")


def test_keys_are_compared_as_wholes() -> None:
    config = ServerConfig(api_key=["first", "second"])
    assert config.allows("first") and config.allows("second")
    for wrong in ("", "firs", "firstt", "FIRST", "first,second", "\udcff", "é"):
        assert not config.allows(wrong)


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_an_address_that_cannot_be_opened_is_named(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"host '{host}', port {port}: [A-Z]"):
            bind(ServerConfig(host=host, port=port))


def test_each_replica_has_an_api_process_unless_their_number_is_given(tmp_path: Path) -> None:
    assert ServerConfig().num_api_processes(3) == 3
    assert ServerConfig(api_processes=2).num_api_processes(3) == 2
    assert ServerConfig(allowed_lora_path=tmp_path).num_api_processes(3) == 1
