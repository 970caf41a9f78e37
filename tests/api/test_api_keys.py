"""API keys: where they come from, who gets to see them, and that their holders share no cache."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm import api, env
from nanovllm.api import start
from nanovllm.api.config import ServerConfig
from nanovllm.api.keys import of_file, with_keys
from nanovllm.api.salts import CacheSalts
from nanovllm.config import EngineConfig
from nanovllm.serving import supervisor
from tests.api.mock_api_server import MODEL, TEMPLATE, MockServer, served

KEYS = ["first-key", "second-key"]
USER: Any = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 1},
    "/v1/chat/completions": {"messages": USER, "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
}


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOVLLM_API_KEY", raising=False)


@contextmanager
def seen_salts(**options: Any) -> Iterator[tuple[MockServer, list[str | None]]]:
    """A server, and the salts of the prompts that its engine gets."""
    with served(template=TEMPLATE, **options) as server:
        salts: list[str | None] = []
        opens = server.engine.open

        async def spy(prompt: Any, *args: Any, **others: Any) -> Any:
            salts.append(prompt.cache_salt)
            return await opens(prompt, *args, **others)

        server.engine.open = spy  # type: ignore[method-assign]
        yield server, salts


def ask(server: MockServer, path: str, key: str, **body: Any) -> None:
    headers = {"authorization": f"Bearer {key}"}
    answer = server.http.post(path, json={**BODIES[path], **body}, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", BODIES)
def test_each_of_several_keys_has_a_cache_of_its_own(path: str) -> None:
    with seen_salts(api_key=KEYS) as (server, salts):
        for key in (KEYS[0], KEYS[0], KEYS[1]):
            ask(server, path, key)
    num = len(salts) // 3
    first, again, other = (set(salts[i * num : (i + 1) * num]) for i in range(3))
    assert None not in first and first == again and len(first) == 1
    assert other.isdisjoint(first)


def test_the_client_s_salt_is_combined_with_the_key_s() -> None:
    with seen_salts(api_key=KEYS) as (server, salts):
        for key in KEYS:
            for salt in ("mine", "mine", "other", None):
                ask(server, "/v1/chat/completions", key, cache_salt=salt)
    assert salts[:4].count(salts[0]) == 2 and len(set(salts)) == 6
    # a salt cannot be chosen so that it is another key's
    config = ServerConfig(api_key=["a", "ab"])
    found = CacheSalts(config, b"secret")
    assert found.of("a", "b") != found.of("ab", None)


@pytest.mark.parametrize(
    "options",
    [{}, {"api_key": KEYS[:1]}, {"api_key": KEYS, "share_cache_between_keys": True}],
    ids=["no key", "one key", "shared"],
)
def test_without_keys_to_tell_apart_salts_are_those_of_clients(options: dict[str, Any]) -> None:
    with seen_salts(**options) as (server, salts):
        for salt in (None, "mine"):
            ask(server, "/v1/completions", KEYS[0], cache_salt=salt)
    assert salts == [None, None, "mine", "mine"]


def test_a_salt_reveals_no_key() -> None:
    config = ServerConfig(api_key=KEYS)
    found = {CacheSalts(config, secret).of(KEYS[0], None) for secret in (b"one", b"two", b"one")}
    assert len(found) == 2, "it depends on the server's secret, which all its processes share"
    assert not any(KEYS[0] in str(one) for one in found)


# where keys come from --------------------------------------------------------------------------


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_has_a_key_on_each_line(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", "first-key\r\n\n  second-key \n")
    assert of_file(path) == KEYS
    config = with_keys(ServerConfig(api_key=["third"], api_key_file=path))
    assert config.allows("third") and all(map(config.allows, KEYS))
    assert config.api_key_file is None, "it is read once, before other processes start"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o602, 0o666])
def test_a_file_that_others_may_read_is_refused_with_its_mode(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "keys", "first-key\n", mode)
    with pytest.raises(ValueError, match=rf"keys' has the mode {mode:04o}") as caught:
        with_keys(ServerConfig(api_key_file=path))
    assert "first-key" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "has no key"),
        ("\n \n", "has no key"),
        ("schl\u00fcssel\n", "visible ASCII"),
        ("a\tb\n", "api_key is secret"),
        ("a" * (1 << 21), "more than 1048576 bytes"),
    ],
    ids=["empty", "blank", "not ASCII", "tab", "long"],
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        with_keys(ServerConfig(api_key_file=written(tmp_path / "keys", text)))
    with pytest.raises(OSError):
        with_keys(ServerConfig(api_key_file=tmp_path / "missing"))


def test_the_variable_has_keys_with_commas_and_leaves_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NANOVLLM_API_KEY", " first-key,second-key,")
    assert list(with_keys(ServerConfig()).api_key) == KEYS
    assert "NANOVLLM_API_KEY" not in os.environ
    monkeypatch.setenv("NANOVLLM_API_KEY", "old")
    assert list(with_keys(ServerConfig(api_key=KEYS)).api_key) == KEYS, "an option counts instead"


def test_no_child_process_and_no_other_machine_gets_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_API_KEY", "hidden-1")
    monkeypatch.setenv("OPENAI_API_KEY", "hidden-2")
    monkeypatch.setenv("NANOVLLM_STRICT", "1")
    for found in (env.for_children(), env.settings()):
        assert found["NANOVLLM_STRICT"] == "1" and "hidden-" not in json.dumps(found)


def test_a_server_gets_keys_and_a_secret_over_a_private_channel_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    services: list[supervisor.ServerProcesses] = []

    class Noted:
        def __init__(self, service: supervisor.ServerProcesses) -> None:
            services.append(service)

        def run(self) -> int:
            return 0

    monkeypatch.setattr(start.supervisor, "Supervisor", Noted)
    monkeypatch.setenv("NANOVLLM_API_KEY", ",".join(KEYS))
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            assert api.serve(EngineConfig(MODEL), ServerConfig(port=0)) == 0
            monkeypatch.setenv("NANOVLLM_API_KEY", ",".join(KEYS))
    options = json.loads(json.dumps(services[0].options))  # as the processes get them
    assert ServerConfig(**options["server"]).allows(KEYS[1])
    assert len({one.options["cache_secret"] for one in services}) == 2
    assert not any(key in caplog.text for key in KEYS)
