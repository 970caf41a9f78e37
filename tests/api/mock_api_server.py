"""A whole server in a thread of the test, on an engine that makes tokens up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx
import openai
import uvloop

from nanovllm.api.address import bind, url_of
from nanovllm.api.config import ServerConfig
from nanovllm.api.server import Stop, run
from nanovllm.api.service import Service
from nanovllm.config import EngineConfig
from nanovllm.replicas import child_config
from nanovllm.tokenizer import Tokenizer
from scripts.bench.mock_engine import MockEngine, MockOptions

MODEL = "tiny-qwen3"


# a template that has what requests may ask for, and marks by which parsers are found
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}<think></think>{% endif %}"
)


# one that reads neither tools nor variables
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tokenizer(template: str | None = None) -> Tokenizer:
    """That of the model, perhaps with another chat template."""
    found = child_config.tokenizer(EngineConfig(MODEL))
    assert found is not None
    if template is not None:
        found.full.chat_template = template
    return found


class MockServer:
    """url: where it is. http: a client that sends no key. engine: what it answers with. thread:
    that of its event loop."""

    def __init__(
        self, made_up: MockOptions | None = None, template: str | None = None, **options: Any
    ) -> None:
        self.config = ServerConfig(port=0, **options)
        self.engine = MockEngine(EngineConfig(MODEL), tokenizer(template), made_up)
        self._sock = bind(self.config)
        self.url = url_of(self.config, self._sock)
        self.host, port = self._sock.getsockname()[:2]
        self.port = int(port)
        self.code: int | None = None
        self._has_started = threading.Event()
        self.thread = threading.Thread(target=lambda: uvloop.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self.service = Service(self.engine, self.config)
        stop = Stop(self._stopping.wait())
        self.code = await run(self.service, self.engine, self._sock, stop, self._has_started.set)

    def start(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.thread.start()
        assert self._has_started.wait(60)

    def stop(self) -> None:
        """Wish for its end, as SIGTERM does."""
        if self.code is None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    def join(self) -> int | None:
        """Wait for its end; returns the exit code."""
        self.thread.join(60)
        assert not self.thread.is_alive()
        self._sock.close()
        self.http.close()
        return self.code

    def client(self, **options: Any) -> openai.OpenAI:
        given = {"api_key": "any", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)


@contextmanager
def served(
    made_up: MockOptions | None = None, template: str | None = None, **options: Any
) -> Iterator[MockServer]:
    """A server within the block, which must end in order."""
    server = MockServer(made_up, template, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        server.join()
