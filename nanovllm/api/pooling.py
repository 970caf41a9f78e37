"""Endpoints of models that pool: embeddings, classes, scores of pairs, and reranking."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from nanovllm import pairs
from nanovllm.api.errors import invalid
from nanovllm.api.http import JSON, NO_STORE, Exchange
from nanovllm.api.pooled import (
    Results,
    check_num,
    check_text,
    info_of,
    pair_prompts,
    params_of,
    prompts_of,
    results,
)
from nanovllm.api.pooling_schemas import (
    ClassifyBody,
    EmbeddingBody,
    Input,
    PoolingBody,
    RerankBody,
    ScoreBody,
)
from nanovllm.api.prompts import beside
from nanovllm.api.service import Service, response_id
from nanovllm.prompts import Prompt

OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
SIDES = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"))
TEXT = "text"  # the field of a document that is an object


async def embeddings(service: Service, exchange: Exchange) -> None:
    """POST /v1/embeddings."""
    body = await service.body(exchange, EmbeddingBody)
    info_of(service, "embed")
    found = await _results(service, exchange, body, "embed")
    await _answer(exchange, body.model or service.model, "embd-", found, lambda: [
        {"index": i, "object": "embedding", "embedding": _numbers(body, row)}
        for i, row in enumerate(found.rows)
    ])  # fmt: skip


async def pooling(service: Service, exchange: Exchange) -> None:
    """POST /pooling."""
    body = await service.body(exchange, PoolingBody)
    info_of(service, body.task)
    found = await _results(service, exchange, body, body.task)
    await _answer(exchange, body.model or service.model, "pool-", found, lambda: [
        {"index": i, "object": "pooling", "data": _numbers(body, row)}
        for i, row in enumerate(found.rows)
    ])  # fmt: skip


async def _results(
    service: Service, exchange: Exchange, body: EmbeddingBody, task: str | None
) -> Results:
    params = params_of(
        body, task, dimensions=body.dimensions, normalize=body.normalize,
        use_activation=body.use_activation,
    )  # fmt: skip
    if body.messages is None:
        prompts = await prompts_of(service, _input_of(body), params)
    else:
        prompts = [await _conversation(service, body)]
    return await results(service, exchange, prompts, params, body.priority)


def _input_of(body: EmbeddingBody) -> Input:
    if body.input is None:
        raise invalid("input", "input is missing: give it, or messages")
    for name in OF_MESSAGES:
        if getattr(body, name) is not None:
            raise invalid(name, f"{name} needs messages, not input")
    return body.input


async def _conversation(service: Service, body: EmbeddingBody) -> Prompt:
    """The prompt of messages; by default nothing follows the last one."""
    assert body.messages is not None
    if body.input is not None:
        raise invalid("messages", "both input and messages are given: give one of them")
    begins = bool(body.add_generation_prompt)
    if begins and body.continue_final_message:
        words = "add_generation_prompt and continue_final_message do not go together"
        raise invalid("add_generation_prompt", words)
    return await service.prompts.conversation(
        body.messages, begins, body.continue_final_message, None,
        dict(body.chat_template_kwargs or {}),
    )  # fmt: skip


def _numbers(body: EmbeddingBody, row: np.ndarray) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    found: list[float] = row.tolist()
    return found


async def classify(service: Service, exchange: Exchange) -> None:
    """POST /classify."""
    body = await service.body(exchange, ClassifyBody)
    info = info_of(service, "classify")
    params = params_of(body, "classify", use_activation=body.use_activation)
    prompts = await prompts_of(service, body.input, params)
    found = await results(service, exchange, prompts, params, body.priority)
    await _answer(exchange, body.model or service.model, "classify-", found, lambda: [
        {
            "index": i, "label": info.labels[int(row.argmax())], "probs": row.tolist(),
            "num_classes": len(row),
        }
        for i, row in enumerate(found.rows)
    ])  # fmt: skip


async def score(service: Service, exchange: Exchange) -> None:
    """POST /score."""
    body = await service.body(exchange, ScoreBody)
    info_of(service)
    sides = [pair for pair in SIDES if any(getattr(body, name) is not None for name in pair)]
    if len(sides) != 1:
        raise invalid("text_1", "give text_1 and text_2, data_1 and data_2, or queries and "
                      "documents")  # fmt: skip
    both = []
    for name in sides[0]:
        given = getattr(body, name)
        texts = [given] if isinstance(given, str) else given
        if not texts:
            raise invalid(name, f"{name} is {'empty' if texts == [] else 'missing'}")
        check_num(service, name, len(texts))
        for text in texts:
            check_text(service, name, text)
        both.append(texts)
    all_pairs = pairs.paired(*both)
    scores, found = await _scores(service, exchange, body, all_pairs)
    await _answer(exchange, body.model or service.model, "score-", found, lambda: [
        {"index": i, "object": "score", "score": one} for i, one in enumerate(scores)
    ])  # fmt: skip


async def rerank(service: Service, exchange: Exchange) -> None:
    """POST /v1/rerank, /v2/rerank and /rerank."""
    body = await service.body(exchange, RerankBody)
    info_of(service)
    if not body.documents:
        raise invalid("documents", "documents is empty")
    if body.top_n is not None and body.top_n < 0:
        raise invalid("top_n", f"top_n is {body.top_n}: it must be at least 0, for all documents")
    check_num(service, "documents", len(body.documents))
    texts = [_document(one) for one in body.documents]
    check_text(service, "query", body.query)
    for text in texts:
        check_text(service, "documents", text)
    scores, found = await _scores(service, exchange, body, [(body.query, one) for one in texts])
    best = sorted(range(len(texts)), key=lambda i: (-scores[i], i))[: body.top_n or None]
    with_text = body.return_documents is not False
    answer = {
        "id": response_id("rerank-", None), "model": body.model or service.model,
        "usage": {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens},
        "results": [
            {"index": i, **({"document": {TEXT: texts[i]}} if with_text else {}),
             "relevance_score": scores[i]}
            for i in best
        ],
    }  # fmt: skip
    await exchange.json(answer)


def _document(given: str | dict[str, Any]) -> str:
    if isinstance(given, str):
        return given
    text = given.get(TEXT)
    if not isinstance(text, str) or len(given) > 1:
        raise invalid("documents", "a document is an object: it must have the field 'text' alone")
    return text


async def _scores(
    service: Service,
    exchange: Exchange,
    body: ScoreBody | RerankBody,
    all_pairs: Sequence[tuple[str, str]],
) -> tuple[list[float], Results]:
    """The scores of pairs: by the model's head, or the cosines of embeddings."""
    info = info_of(service)
    params = params_of(body, "score", use_activation=body.use_activation)
    if info.makes == "classify":
        if info.size != 1:
            raise invalid("model", f"scores need a model with one class: it has {info.size}")
        prompts = await pair_prompts(service, exchange, all_pairs, params, body.instruction)
        found = await results(service, exchange, prompts, params, body.priority)
        return [float(row[0]) for row in found.rows], found
    if body.instruction is not None:
        raise invalid("instruction", "instruction is given, but this model reads none")
    texts = list(dict.fromkeys(text for pair in all_pairs for text in pair))
    prompts = await prompts_of(service, list(texts), params)
    found = await results(service, exchange, prompts, params, body.priority)
    by_text = dict(zip(texts, found.rows))
    return [pairs.cosine(by_text[first], by_text[second]) for first, second in all_pairs], found


async def _answer(
    exchange: Exchange, model: str, prefix: str, found: Results, data: Callable[[], list[Any]]
) -> None:
    """Send the list that most endpoints answer with. data: makes its entries, in a thread if there
    are many numbers."""
    about = {
        "id": response_id(prefix, None), "object": "list", "created": int(time.time()),
        "model": model, "usage": found.usage(),
    }  # fmt: skip
    size = sum(map(len, found.rows))
    body = await beside(lambda: msgspec.json.encode({**about, "data": data()}), size)
    await exchange.answer(200, body, (JSON, NO_STORE))
