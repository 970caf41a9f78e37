"""Servers for the tests of what requests may do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import TEMPLATE, MockServer, served

KEYS = ["first-key", "second-key"]
USER: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(MockOptions(max_model_len=256), TEMPLATE) as one:
        yield one


@pytest.fixture(scope="module")
def locked() -> Iterator[MockServer]:
    with served(api_key=KEYS) as one:
        yield one


def ask(server: MockServer, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return server.http.post(path, json=body)
