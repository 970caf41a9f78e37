"""A small server for tests of the page: made-up answers, states on demand, all requests kept."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nanovllm.api.latencies import Latencies, Timer
from nanovllm.api.page import HEADERS, files
from nanovllm.api.prometheus import CONTENT_TYPE, render
from nanovllm.engine.metrics import Counter, Gauge, Metric

MARKDOWN = """A **merge** takes two sorted lists, and gives *one*:

1. Compare the heads.
2. Take the smaller one.
   - Equal ones in order.

```python
def merge(a: list[int], b: list[int]) -> list[int]:
    return sorted(a + b)  # <b>not bold</b>

print(merge([1], [19]))
```

| step | cost |
|---|---|
| compare | `O(1)` |

See [the docs](https://example.org/x) or
[this](javascript://x/%0Aalert%601%60), <img src=x onerror=alert(2)>.
"""
THOUGHT = "The user wants a short answer.\nI give one."


class PageServer:
    """state: "ready", "draining" or "broken". key: what requests need, if set.

    model: its root in /v1/models. refusal: the status of all answers, if set. text: of all answers,
    if set. delay: seconds between two words of an answer. waits: whether answers wait after their
    first word until `goes_on` is set. bodies: of all chat requests. num_left: answers that their
    client did not wait for.
    """

    def __init__(self) -> None:
        self.state, self.key, self.sees, self.delay = "ready", "", False, 0.005
        self.model, self.refusal, self.text = "tiny-qwen3", 0, ""
        self.waits, self.goes_on = False, threading.Event()
        self.bodies: list[dict[str, Any]] = []
        self.num_left = self.num_tokens = self.num_running = 0
        self.latencies = Latencies()
        routes = [Route(path, self._file) for path in files()]
        routes += [
            Route("/ready", self._ready),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), port=0, log_level="error", timeout_graceful_shutdown=0
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def start(self) -> str:
        """Start it; returns its URL."""
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/"

    def end(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        return None

    async def _file(self, request: Request) -> Response:
        file = files()[request.url.path]
        headers = {name.decode(): value.decode() for name, value in HEADERS}
        return Response(file.body, media_type=file.content_type, headers=headers)

    async def _ready(self, request: Request) -> Response:
        return Response(status_code=200 if self.state == "ready" else 503)

    async def _health(self, request: Request) -> Response:
        return Response(status_code=503 if self.state == "broken" else 200)

    async def _models(self, request: Request) -> Response:
        kinds = ["text", "image"] if self.sees else ["text"]
        one: dict[str, Any] = {"id": "tiny-qwen3", "object": "model", "root": self.model}
        one["input_modalities"] = kinds
        return self._refusal(request) or JSONResponse({"object": "list", "data": [one]})

    async def _metrics(self, request: Request) -> Response:
        metrics: list[Metric] = [
            Gauge("nanovllm:num_requests_running", self.num_running),
            Gauge("nanovllm:num_requests_waiting", 0),
            Gauge("nanovllm:kv_cache_usage_perc", min(1, 0.01 + self.num_running * 0.08)),
            Counter("nanovllm:prompt_tokens", 19 * len(self.bodies)),
            Counter("nanovllm:generation_tokens", self.num_tokens),
        ]
        text = render(metrics, [self.latencies], {"model_name": "tiny-qwen3"})
        return self._refusal(request) or Response(text, media_type=CONTENT_TYPE)

    async def _chat(self, request: Request) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        body = await request.json()
        self.bodies.append(body)
        if self.state != "ready":
            return JSONResponse({"error": {"message": "shuts down"}}, 503)
        if self.refusal:
            return JSONResponse({"error": {"message": "too long by 19 tokens"}}, self.refusal)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        timer = self.latencies.timer()
        self.num_running += 1
        try:
            num = 0
            for delta in deltas(body["messages"][-1]["content"], self.text):
                await asyncio.sleep(self.delay)
                while self.waits and num == 1 and not self.goes_on.is_set():
                    await asyncio.sleep(0.005)
                num += 1
                self._count(timer)
                yield event([{"index": 0, "delta": delta, "finish_reason": None}], num)
            yield event([{"index": 0, "delta": {}, "finish_reason": "stop"}], num)
            yield event([], num)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        finally:
            self.num_running -= 1
            timer.end()

    def _count(self, timer: Timer) -> None:
        timer.tokens(1)
        self.num_tokens += 1


def event(choices: list[dict[str, Any]], num: int) -> str:
    usage = {"prompt_tokens": 19, "completion_tokens": num, "total_tokens": 19 + num}
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"


def deltas(content: Any, whole: str = "") -> list[dict[str, str]]:
    """The answer to a prompt that says "think", "list", "forever" or anything else; or `whole`."""
    if whole:
        return [{"content": part} for part in re.findall(r"\S*\s*", whole) if part]
    text = content if isinstance(content, str) else content[-1]["text"]
    words = ["Hello", "from", "the", "server."]
    if "list" in text:
        words = MARKDOWN.split(" ")
    elif "forever" in text:
        words = ["on"] * 100_000
    answer = [{"content": f"{' ' if i else ''}{word}"} for i, word in enumerate(words)]
    if "think" in text:
        return [*({"reasoning_content": f"{word} "} for word in THOUGHT.split(" ")), *answer]
    return answer
