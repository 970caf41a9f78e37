"""An HTTP server in the test's event loop, on a client of an engine, and clients of that server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple, TypeVar

import httpx
import openai

from nanovllm import LLM
from nanovllm.api.address import bind, url_of
from nanovllm.api.config import ServerConfig
from nanovllm.api.server import Stop, run
from nanovllm.api.service import Service
from nanovllm.engine.engine import Engine
from nanovllm.pooling.engine import PoolingEngine
from nanovllm.serving.client import Client
from tests.serving.served import serve

Result = TypeVar("Result")
MAX_BODY_BYTES = 1 << 16
MODEL, ALIAS = "tiny", "another-name"
ASKED: dict[str, Any] = {"model": MODEL, "temperature": 0}
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


class Served(NamedTuple):
    engine: Client
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI

    async def text(self, messages: Any) -> str:
        """The content of an answer of 8 tokens."""
        asked: Any = {**ASKED, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
        done = await self.openai.chat.completions.create(messages=messages, **asked)
        return done.choices[0].message.content or ""

    async def token_ids(self, messages: Any, num: int) -> tuple[list[int], list[int]]:
        """Those of the prompt and of an answer, by the official client."""
        extra = {"ignore_eos": True, "return_token_ids": True}
        asked: Any = {**ASKED, "max_tokens": num, "extra_body": extra}
        done = await self.openai.chat.completions.create(messages=messages, **asked)
        return (done.model_extra or {})["prompt_token_ids"], (done.choices[0].model_extra or {})[
            "token_ids"
        ]

    async def refusal(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = await self.http.post(path, json={**ASKED, **body})
        return answer.status_code, answer.json()["error"]


Work = Callable[[Served], Coroutine[Any, Any, Result]]


def through_http(llm: LLM, work: Work[Result]) -> Result:
    """The result of `work` with clients of a server on this model."""
    assert isinstance(llm.engine, Engine | PoolingEngine)
    return serve(llm.engine, partial(serve_and_work, work))


async def serve_and_work(work: Work[Result], client: Client) -> Result:
    """The result of `work` with clients of a server on an engine's client."""
    await client.ready()
    config = ServerConfig(port=0, max_body_bytes=MAX_BODY_BYTES, served_model_name=[MODEL, ALIAS])
    wish, has_started = asyncio.Event(), asyncio.Event()
    with bind(config) as sock:
        stop, url = Stop(wish.wait()), url_of(config, sock)
        service = Service(client, config)
        serving = asyncio.create_task(run(service, client, sock, stop, has_started.set))
        await has_started.wait()
        try:
            async with (
                httpx.AsyncClient(base_url=url, timeout=60) as http,
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as official,
            ):
                return await work(Served(client, http, official))
        finally:
            wish.set()
            assert await serving == 0
