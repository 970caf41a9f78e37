"""The ASGI application: routes, API keys, errors, the access log."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any, NamedTuple

import msgspec

from nanovllm.api import adapters, others, page, paths, pooling
from nanovllm.api.anthropic_errors import AnthropicError
from nanovllm.api.anthropic_messages import count_tokens, messages
from nanovllm.api.chat import chat
from nanovllm.api.completions import completions
from nanovllm.api.config import ALWAYS_OPEN
from nanovllm.api.errors import ApiError, from_exception
from nanovllm.api.http import AccessRecord, ClientGone, Exchange, Receive, Scope, Send
from nanovllm.api.openapi import description
from nanovllm.api.responses import input_tokens, responses
from nanovllm.api.service import MAX_ID_CHARS, Service
from nanovllm.api.trusted_host import TrustedHosts
from nanovllm.prompts import PROMPT

logger = logging.getLogger(__name__)
access = logging.getLogger("nanovllm.api.access")
MAX_LOGGED_CHARS = 1000
MAX_TRACEPARENT_CHARS = 256
PAGE = "/page/"
METRICS = "/metrics"
BAD_REQUEST = 400
CLIENT_GONE = 499  # nginx's, for the log and traces


class Route(NamedTuple):
    method: str
    endpoint: others.Endpoint


async def openapi(service: Service, exchange: Exchange) -> None:
    """GET /openapi.json."""
    await exchange.json(description(service))


ROUTES = {
    "/v1/models": Route("GET", others.models),
    "/v1/completions": Route("POST", completions),
    "/v1/chat/completions": Route("POST", chat),
    "/v1/responses": Route("POST", responses),
    "/v1/responses/input_tokens": Route("POST", input_tokens),
    "/v1/messages": Route("POST", messages),
    "/v1/messages/count_tokens": Route("POST", count_tokens),
    "/v1/embeddings": Route("POST", pooling.embeddings),
    "/pooling": Route("POST", pooling.pooling),
    "/classify": Route("POST", pooling.classify),
    **dict.fromkeys(("/score", "/v1/score"), Route("POST", pooling.score)),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), Route("POST", pooling.rerank)),
    "/v1/load_lora_adapter": Route("POST", adapters.load),
    "/v1/unload_lora_adapter": Route("POST", adapters.unload),
    "/tokenize": Route("POST", others.tokenize),
    "/detokenize": Route("POST", others.detokenize),
    "/health": Route("GET", others.health),
    "/ready": Route("GET", others.ready),
    "/version": Route("GET", others.version),
    METRICS: Route("GET", others.metrics),
    "/openapi.json": Route("GET", openapi),
}
# each endpoint's names for fields that the engine names differently
NAMES = {
    "/v1/chat/completions": {PROMPT: "messages"},
    "/v1/responses": {PROMPT: "input"},
    "/v1/responses/input_tokens": {PROMPT: "input"},
    "/v1/messages": {PROMPT: "messages"},
    "/v1/messages/count_tokens": {PROMPT: "messages"},
    **{path: {PROMPT: "input"} for path in ("/v1/embeddings", "/pooling", "/classify")},
    **{path: {PROMPT: "documents"} for path in ("/v1/rerank", "/v2/rerank", "/rerank")},
}
ANTHROPIC = "/v1/messages"  # prefix of Anthropic's endpoints


class App:
    """Answers HTTP requests with an engine."""

    def __init__(self, service: Service, hosts: TrustedHosts) -> None:
        """hosts: the host names that clients may use."""
        self.service, self.config, self._hosts = service, service.config, hosts
        self.routes = dict(ROUTES)
        self._page = page.files()
        self._polled = {*ALWAYS_OPEN, METRICS, *self._page}  # logged only if they fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']} is not served")
        exchange = Exchange(scope, receive, send, AccessRecord(""))
        exchange.record.request_id = _request_id(exchange)
        if _is_of_anthropic(exchange):
            exchange.id_headers.append(b"request-id")
        try:
            await self._answer(exchange)
        except ClientGone:
            if not exchange.has_started:
                exchange.record.status = CLIENT_GONE
        except asyncio.CancelledError:
            pass  # the server shuts down
        except Exception as error:
            await self._refuse(exchange, error)
        finally:
            record = exchange.record
            if self.config.access_log and not self._is_polled(exchange):
                _log(exchange)
            if self.service.traces is not None and record.route is not None:
                parent = exchange.header(b"traceparent")
                headers = {"traceparent": parent} if len(parent) <= MAX_TRACEPARENT_CHARS else {}
                self.service.traces.add(record, record.route, headers)

    async def _answer(self, exchange: Exchange) -> None:
        path = exchange.scope["path"]
        if path not in ALWAYS_OPEN:
            self._hosts.check(exchange.headers(b"host"))
        if self.config.api_key and not self._is_open(path):
            self._check_key(exchange)
        if path in self._page:
            await self._send_page(exchange, path)
            return
        route = self.routes.get(path)
        if route is None and path.startswith(others.MODELS) and path != others.MODELS:
            route = Route("GET", others.model)
        if route is None:
            hint = paths.hint(path[:MAX_ID_CHARS], self.routes)
            raise ApiError(404, f"there is no such path: {hint}", code="unknown_path")
        method = exchange.scope["method"]
        if method != route.method and (method, route.method) != ("HEAD", "GET"):
            raise _wrong_method(route.method)
        if method == "POST":
            exchange.record.route = path
        await route.endpoint(self.service, exchange)

    def _is_open(self, path: str) -> bool:
        if path.startswith(PAGE):
            path = "/"  # the page's files are as open as the page
        return path in ALWAYS_OPEN or path in self.config.open_paths

    def _is_polled(self, exchange: Exchange) -> bool:
        return exchange.scope["path"] in self._polled and 0 < exchange.record.status < BAD_REQUEST

    async def _send_page(self, exchange: Exchange, path: str) -> None:
        if exchange.scope["method"] not in ("GET", "HEAD"):
            raise _wrong_method("GET")
        file = self._page[path]
        kind = (b"content-type", file.content_type.encode())
        await exchange.answer(200, file.body, [kind, *page.HEADERS])

    def _check_key(self, exchange: Exchange) -> None:
        kind, _, key = exchange.header(b"authorization").partition(" ")
        bearer = key.strip() if kind.lower() == "bearer" else ""
        given = (bearer, exchange.header(b"x-api-key").strip())  # OpenAI's and Anthropic's
        valid = [one for one in given if self.config.allows(one)]
        if not valid:
            words = "the request needs a key: Authorization: Bearer KEY, or x-api-key: KEY"
            raise ApiError(401, words, code="invalid_api_key")
        exchange.api_key = valid[0]

    async def _refuse(self, exchange: Exchange, error: Exception) -> None:
        service, names = self.service, NAMES.get(exchange.scope["path"])
        told = from_exception(error, names, service.engine.config.model, repr(service.model)[1:-1])
        if told.code == "internal_error":
            # neither the message nor values of variables: they may contain the prompt
            logger.error(
                "request %s: %s", exchange.record.request_id, _place_of(error), stacklevel=1
            )
        if _is_of_anthropic(exchange):
            told = AnthropicError(told, exchange.record.request_id)
        await exchange.refuse(told)


def _is_of_anthropic(exchange: Exchange) -> bool:
    return str(exchange.scope["path"]).startswith(ANTHROPIC)


def _wrong_method(method: str) -> ApiError:
    error = ApiError(405, f"use {method}", code="method_not_allowed")
    error.headers.append((b"allow", method.encode()))
    return error


def _place_of(error: BaseException) -> str:
    """The type of an error and the functions of its traceback."""
    places = []
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        places.append(f"{code.co_name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return f"{type(error).__name__} in {' > '.join(places)}"


def _request_id(exchange: Exchange) -> str:
    """The client's request id if it is a plain one, else a random one."""
    given = exchange.header(b"x-request-id")
    if 0 < len(given) <= MAX_ID_CHARS and given.replace("-", "").replace("_", "").isalnum():
        return given if given.isascii() else secrets.token_hex(8)
    return secrets.token_hex(8)


def _log(exchange: Exchange) -> None:
    record, scope = exchange.record, exchange.scope
    if not access.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "id": record.request_id, "method": scope["method"], "path": scope["path"][:256],
        "status": record.status, "seconds": round(time.perf_counter() - record.start, 4),
    }  # fmt: skip
    if record.num_prompt_tokens:
        fields |= {"prompt_tokens": record.num_prompt_tokens, "tokens": record.num_tokens}
    if record.first_token is not None:
        fields["first_token_seconds"] = round(record.first_token, 4)
    for name in ("user", "prompt"):
        if (value := getattr(record, name)) is not None:
            fields[name] = value[:MAX_LOGGED_CHARS]
    try:  # JSON, so that a request cannot forge log lines
        access.info("%s", msgspec.json.encode(fields).decode())
    except UnicodeEncodeError:
        access.info("request %s: %d", record.request_id, record.status)


def with_cors(app: App) -> Any:
    """The application, with CORS if the options allow other origins."""
    if not app.config.allowed_origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        app,  # type: ignore[arg-type]
        allow_origins=list(app.config.allowed_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # echoes the requested ones: clients add custom headers
        expose_headers=["x-request-id", "request-id", "retry-after"],
    )
