"""The results of a request's prompts by a model that pools, and the prompts themselves."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nanovllm import pairs
from nanovllm.api.errors import ApiError, invalid
from nanovllm.api.http import Exchange
from nanovllm.api.pooling_schemas import Input, Pooled
from nanovllm.api.prompts import beside
from nanovllm.api.service import Service
from nanovllm.checks import InvalidValue
from nanovllm.pooling_params import PoolingInfo, PoolingParams
from nanovllm.prompts import Prompt, PromptTooLong, check_pooled, checked_text
from nanovllm.serving.async_engine import Stream


class Results(NamedTuple):
    """rows: fp32, in the order of the prompts."""

    rows: list[np.ndarray]
    num_tokens: int

    def usage(self) -> dict[str, Any]:
        num = self.num_tokens
        return {
            "prompt_tokens": num, "total_tokens": num, "completion_tokens": 0,
            "prompt_tokens_details": None,
        }  # fmt: skip


def info_of(service: Service, makes: str | None = None) -> PoolingInfo:
    """The facts of the model. Raises ApiError for one that does not pool, or makes other results
    than these."""
    found = service.engine.pooling
    if found is None:
        raise _unsupported(f"{service.model!r} generates text, not embeddings")
    if makes is not None and found.makes != makes:
        words = {"embed": "embeddings", "classify": "scores of classes"}
        raise _unsupported(f"{service.model!r} makes {words[found.makes]}, not {words[makes]}")
    return found


def _unsupported(words: str) -> ApiError:
    return ApiError(400, words, param="model", code="unsupported_model")


def params_of(body: Pooled, task: str | None, **fields: Any) -> PoolingParams:
    """The parameters of a request. Raises ValueError."""
    return PoolingParams(task=task, truncate_prompt_tokens=body.truncate_prompt_tokens, **fields)


async def prompts_of(service: Service, given: Input, params: PoolingParams) -> list[Prompt]:
    """One or several texts, or one or several lists of token ids, with token ids."""
    several: list[Any] = list(given) if isinstance(given, list) else [given]
    if several and isinstance(several[0], int):
        several = [several]
    if not several:
        raise invalid("input", "input is empty")
    kinds = {type(one) for one in several}
    if len(kinds) > 1 or kinds == {int}:
        raise invalid("input", "input mixes texts and token ids")
    check_num(service, "input", len(several))
    if kinds == {list}:
        return [Prompt(None, one) for one in several]
    for number, text in enumerate(several):
        if not text:
            raise invalid("input", f"input {number} is empty: it must have at least 1 token")
        check_text(service, "input", text)
    work = partial(_encoded, service, several, params)
    return await beside(work, sum(map(len, several)))


def _encoded(service: Service, texts: Sequence[str], params: PoolingParams) -> list[Prompt]:
    tokenizer = service.engine.tokenizer
    if tokenizer is None:
        return [Prompt(text, None) for text in texts]
    limit = limit_of(service, params)
    return list(map(Prompt, texts, tokenizer.encode_many(texts, limit)))


def limit_of(service: Service, params: PoolingParams) -> int | None:
    limit = params.truncate_prompt_tokens
    return service.engine.max_model_len if limit == -1 else limit


async def pair_prompts(
    service: Service,
    exchange: Exchange,
    all_pairs: Sequence[tuple[str, str]],
    params: PoolingParams,
    instruction: str | None,
) -> list[Prompt]:
    """The prompts of pairs for a model with a head. Raises ValueError, at the first pair that is
    too long, and ClientGone."""
    info, tokenizer = info_of(service), service.engine.tokenizer
    limit, longest = limit_of(service, params), service.engine.max_model_len
    size = _checked_size(service, all_pairs)
    is_over = threading.Event()

    def make() -> list[Prompt]:
        made: list[Prompt] = []
        for first, second in all_pairs:
            if is_over.is_set():
                break
            one = pairs.pair_prompt(info, tokenizer, first, second, instruction, limit)
            if one.token_ids is None and tokenizer is not None and one.text:
                one = replace(one, token_ids=tokenizer.encode_first(one.text, limit))
            check_pooled(len(one.token_ids or ()), longest)
            made.append(one)
        return made

    try:
        return await exchange.unless_gone(beside(make, size))
    finally:
        is_over.set()  # a thread does not end when its task is cancelled


def _checked_size(service: Service, all_pairs: Sequence[tuple[str, str]]) -> int:
    """The characters of all pairs. They are encoded with their query each, so a body with many
    documents stands for a text that is much longer than itself."""
    size = sum(len(text) for pair in all_pairs for text in pair)
    most = service.config.max_body_bytes
    if size > most:
        raise PromptTooLong(
            f"the pairs have {size} characters, with the query in each: at most {most} "
            "(max_body_bytes) are allowed"
        )
    return size


def check_num(service: Service, name: str, num: int) -> None:
    """Refuse more texts than the limit."""
    most = service.config.max_inputs
    if num > most:
        raise invalid(name, f"{name} has {num} texts: at most {most} are allowed")


def check_text(service: Service, name: str, text: str) -> None:
    """Refuse a text that is too long or not Unicode, before it is encoded."""
    service.prompts.check_length(text, name)
    checked_text(name, text, name)


async def results(
    service: Service,
    exchange: Exchange,
    prompts: Sequence[Prompt],
    params: PoolingParams,
    priority: int | None = None,
) -> Results:
    """The results of all prompts; they are aborted if the client disconnects. Raises the errors of
    `AsyncEngine.open`, and ApiError if one has no result."""
    service.check_fits(len(prompts))
    if service.config.log_prompts:
        exchange.record.prompt = "; ".join(str(one.text or one.token_ids) for one in prompts)
    streams: list[Stream] = []
    try:
        for prompt in prompts:
            streams.append(await service.engine.open(prompt, params, priority=priority or 0))
        rows = await exchange.unless_gone(_rows(streams))
    finally:
        for stream in streams:
            stream.abort()
    for _ in streams:
        service.own_latencies.timer(exchange.record.start).end()
    record, num_tokens = exchange.record, sum(len(one.prompt_token_ids) for one in streams)
    record.num_prompt_tokens = num_tokens
    record.has_token()
    return Results(rows, num_tokens)


async def _rows(streams: Sequence[Stream]) -> list[np.ndarray]:
    rows = []
    for stream in streams:
        async for delta in stream:
            if delta.pooled is None:
                _raise(delta.finish_reason, delta.error, delta.error_field)
            else:
                rows.append(delta.pooled)
    return rows


def _raise(reason: str | None, error: str | None, field: str | None) -> None:
    if field is not None:
        raise InvalidValue(field, str(error))
    if reason == "abort":
        raise ApiError(503, "the server aborted the request", code="aborted")
    raise ApiError(500, "pooling failed", code="answer_failed")
