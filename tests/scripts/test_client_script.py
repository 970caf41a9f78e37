"""scripts/clients.py: its clients that are installed, and the model that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.config import EngineConfig
from nanovllm.replicas import child_config
from scripts import clients
from tests.api.mock_api_server import MODEL, MockServer, served


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(template=clients.TEMPLATE) as one:
        yield one


@pytest.mark.parametrize("name", ["openai", "openai-responses", "anthropic"])
@pytest.mark.parametrize("case", ["plain", "stream", "turns", "error"])
def test_a_case_works(server: MockServer, name: str, case: str) -> None:
    client = clients.CLIENTS[name](server.url, MODEL, key="any")
    assert clients.outcome(client, case) == "ok"


def test_a_case_that_fails_says_why(server: MockServer) -> None:
    client = clients.CLIENTS["openai"](server.url, "nothing", key="any")
    assert "there is no model 'nothing'" in clients.outcome(client, "plain")
    made_up = clients.CLIENTS["openai"](server.url, MODEL, key="any")
    assert "Error" in clients.outcome(made_up, "form")  # it makes up text, which is no JSON


def test_the_model_that_is_written_has_a_template_with_tools(tmp_path: Path) -> None:
    clients.write_model(tmp_path / "model")
    found = child_config.tokenizer(EngineConfig(str(tmp_path / "model")))
    assert found is not None and "tool_call" in found.full.chat_template
