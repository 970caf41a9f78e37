"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from nanovllm.api import logprobs
from nanovllm.api.generation import EventEncoder, Generation, WholeAnswer, respond
from nanovllm.api.http import Exchange
from nanovllm.api.schemas import CompletionBody
from nanovllm.api.service import Service, response_id, usage_options
from nanovllm.api.structured import form_field
from nanovllm.outputs import TopLogprobs
from nanovllm.prompts import Prompt
from nanovllm.sampling import SamplingParams
from nanovllm.serving.async_engine import Delta


async def completions(service: Service, exchange: Exchange) -> None:
    body = await service.body(exchange, CompletionBody)
    params = service.params.of_completion(body)
    answer_id = response_id("cmpl-", body.request_id)
    prompts = await service.prompts.of_completion(body)
    text_of = service.prompts.token_text
    form = form_field(body)
    generation = await Generation.open(service, exchange, prompts, params, body.priority, form)
    try:  # only ids that the engine accepted can be decoded
        echoed = await _echoed(service, prompts, generation, params) if body.echo else None
    except BaseException:
        generation.abort()
        raise
    meta = {
        "id": answer_id, "object": "text_completion", "created": int(time.time()),
        "model": body.model or service.model,
    }  # fmt: skip
    writer = CompletionWriter(body, params, generation, meta, echoed, text_of)
    await respond(exchange, generation, writer, is_stream=bool(body.stream))


async def _echoed(
    service: Service, prompts: Sequence[Prompt], generation: Generation, params: SamplingParams
) -> list[str]:
    """The texts of prompts; of one that may be truncated, that of the tokens which are left."""
    most = params.truncate_prompt_tokens
    if most == -1:
        most = service.engine.max_model_len - 1
    several = [stream.prompt_token_ids for stream in generation.streams]
    texts = [
        prompt.text if most is None or len(token_ids) < most else None
        for prompt, token_ids in zip(prompts, several)
    ]
    missing = [token_ids for token_ids, text in zip(several, texts) if text is None]
    decoded = iter(await service.prompts.texts(missing) if missing else ())
    return [next(decoded) if text is None else text for text in texts]


class CompletionWriter:
    """Writes responses with OpenAI's and vLLM's fields.

    echoed: the prompts' texts, which start the answers. text_of: returns the text of one token.
    """

    def __init__(
        self,
        body: CompletionBody,
        params: SamplingParams,
        generation: Generation,
        meta: dict[str, Any],
        echoed: Sequence[str] | None,
        text_of: Callable[[int], str],
    ) -> None:
        self._text_of = text_of
        self._body, self._n, self._meta, self._echoed = body, params.n, meta, echoed
        self._generation = generation
        self._has_usage, self._is_continuous = usage_options(body.stream_options)
        self._chunks = EventEncoder(meta, has_usage=self._has_usage)
        self._lengths: dict[int, int] = {}  # answer number -> characters sent
        self._is_plain = not (
            self._is_continuous or body.return_token_ids or body.logprobs is not None
        )
        self._drops_answer = body.max_tokens == 0  # echo only
        self._as_ids = bool(body.return_tokens_as_token_ids)

    def events(self, number: int, delta: Delta) -> bytes:
        if self._drops_answer:
            # the engine generates at least one token
            delta = replace(delta, text="", token_ids=[], stop_reason=None)
            self._generation.num_tokens = 0
        text = delta.text
        is_first = number not in self._lengths
        if is_first and self._echoed is not None:
            text = self._echoed[number // self._n] + text
        offset = self._lengths.get(number, 0)
        self._lengths[number] = offset + len(text)
        content = b'"text":' + msgspec.json.encode(text)
        if self._is_plain and delta.finish_reason is None:
            return self._chunks.plain(number, content) if text or is_first else b""
        choice: dict[str, Any] = {"logprobs": None}
        if delta.logprobs is not None:
            choice["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs, offset)
        choice["finish_reason"] = "length" if self._drops_answer else delta.finish_reason
        choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = self._generation.prompt_ids(number) if is_first else None
        usage = self._generation.usage() if self._is_continuous else None
        return self._chunks.full(number, content, choice, usage)

    def end(self) -> bytes:
        return self._chunks.end(self._generation.usage() if self._has_usage else None)

    def whole(self, answers: Sequence[WholeAnswer]) -> dict[str, Any]:
        if self._drops_answer:
            self._generation.num_tokens = 0
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return {**self._meta, "choices": choices, "usage": self._generation.usage()}

    def _choice(self, number: int, answer: WholeAnswer) -> dict[str, Any]:
        last = answer.last
        assert last is not None
        text, token_ids, found = answer.text, answer.token_ids, answer.logprobs
        prompt_ids = self._generation.prompt_ids(number)
        if self._drops_answer:
            text, token_ids, found = "", [], None if found is None else []
        shown: dict[str, Any] | None = None
        if self._echoed is not None:
            text = self._echoed[number // self._n] + text
        if found is not None and self._echoed is not None:
            all_found = [*(last.prompt_logprobs or []), *found]
            shown = self._logprobs([*prompt_ids, *token_ids], all_found, 0)
        elif found is not None:
            shown = self._logprobs(token_ids, found, 0)
        choice = {
            "index": number, "text": text, "logprobs": shown,
            "finish_reason": "length" if self._drops_answer else last.finish_reason,
            "stop_reason": None if self._drops_answer else last.stop_reason,
        }  # fmt: skip
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.of_prompt(last.prompt_logprobs or [])
        if self._body.return_token_ids:
            choice |= {"token_ids": token_ids, "prompt_token_ids": prompt_ids}
        return choice

    def _logprobs(
        self, token_ids: Sequence[int], found: Sequence[TopLogprobs | None], offset: int
    ) -> dict[str, Any]:
        num_top = self._body.logprobs or 0
        first = self._text_of(token_ids[0]) if found and found[0] is None else ""
        return logprobs.of_completion(token_ids, found, num_top, self._as_ids, offset, first)
