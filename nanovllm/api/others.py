"""Endpoints that do not generate: models, tokens, health, version, metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from nanovllm.api import prometheus
from nanovllm.api.errors import ApiError, invalid
from nanovllm.api.http import Exchange
from nanovllm.api.prompts import beside
from nanovllm.api.schemas import DetokenizeBody, TokenizeBody
from nanovllm.api.service import Service
from nanovllm.sampling import INT32_MAX
from nanovllm.schedule.logprobs import SHOW_SPECIAL

Endpoint = Callable[[Service, Exchange], Awaitable[None]]
MODELS = "/v1/models/"


async def models(service: Service, exchange: Exchange) -> None:
    """GET /v1/models."""
    cards = [_card(service, name) for name in (*service.model_names, *service.adapters)]
    await exchange.json({"object": "list", "data": cards})


async def model(service: Service, exchange: Exchange) -> None:
    """GET /v1/models/NAME."""
    name = exchange.scope["path"].removeprefix(MODELS)
    service.check_model(name)
    await exchange.json(_card(service, name))


def _card(service: Service, name: str) -> dict[str, Any]:
    adapter = service.adapters.get(name)
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "nanovllm",
        "root": service.model if adapter is None else name,
        "parent": None if adapter is None else service.model,
        "max_model_len": service.engine.max_model_len,
        "input_modalities": service.modalities,
    }  # fmt: skip


async def tokenize(service: Service, exchange: Exchange) -> None:
    """POST /tokenize."""
    body = await service.body(exchange, TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "give either prompt or messages")
    token_ids = await service.prompts.of_tokenize(body)
    found: dict[str, Any] = {
        "count": len(token_ids), "max_model_len": service.engine.max_model_len,
        "tokens": token_ids, "token_strs": None,
    }  # fmt: skip
    tokenizer = service.engine.tokenizer
    if body.return_token_strs and tokenizer is not None:
        decode = tokenizer.decode
        found["token_strs"] = await beside(
            lambda: [decode([one], SHOW_SPECIAL) for one in token_ids], len(token_ids)
        )
    await exchange.json(found)


async def detokenize(service: Service, exchange: Exchange) -> None:
    """POST /detokenize."""
    body = await service.body(exchange, DetokenizeBody)
    tokenizer, most = service.engine.tokenizer, service.prompts.max_chars
    if tokenizer is None:
        raise invalid("tokens", "the model has no tokenizer")
    if len(body.tokens) > most:
        raise invalid("tokens", f"tokens has {len(body.tokens)} ids: at most {most} are allowed")
    for number, token_id in enumerate(body.tokens):
        if not 0 <= token_id <= INT32_MAX:
            raise invalid(f"tokens[{number}]", f"tokens[{number}] is not a token id")
    decode = partial(tokenizer.decode, body.tokens, SHOW_SPECIAL)
    await exchange.json({"prompt": await beside(decode, len(body.tokens))})


async def health(service: Service, exchange: Exchange) -> None:
    """GET /health: whether the engine is alive."""
    if service.engine.failure is not None:
        raise ApiError(503, "the engine has failed", code="engine_dead")
    await exchange.json({})


async def ready(service: Service, exchange: Exchange) -> None:
    """GET /ready: whether the server accepts requests."""
    if service.engine.failure is not None:
        raise ApiError(503, "the engine has failed", code="engine_dead")
    if service.engine.is_draining:
        raise ApiError(503, "the server is shutting down", code="draining")
    await exchange.json({})


async def version(service: Service, exchange: Exchange) -> None:
    """GET /version."""
    from nanovllm import __version__

    await exchange.json({"version": __version__})


async def metrics(service: Service, exchange: Exchange) -> None:
    """GET /metrics."""
    found = await service.engine.metrics()
    body = prometheus.render(found, service.latencies, {"model_name": service.model})
    await exchange.answer(200, body, [(b"content-type", prometheus.CONTENT_TYPE.encode())])
