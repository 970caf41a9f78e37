"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import msgspec

from nanovllm.api import logprobs
from nanovllm.api.generation import EventEncoder, Generation, WholeAnswer, respond
from nanovllm.api.http import Exchange
from nanovllm.api.reasoning_tokens import ReasoningTokens
from nanovllm.api.schemas import ChatBody
from nanovllm.api.service import Service, response_id, usage_options
from nanovllm.api.structured import form_field
from nanovllm.api.tools import ToolParsing
from nanovllm.parsers import AnswerStream, CallStart, ContentPart, Part, ReasoningPart, joined
from nanovllm.serving.async_engine import Delta


async def chat(service: Service, exchange: Exchange) -> None:
    body = await service.body(exchange, ChatBody)
    answer_id = response_id("chatcmpl-", body.request_id)
    opened = await open_chat(service, exchange, body)
    meta = {
        "id": answer_id, "object": "chat.completion", "created": int(time.time()),
        "model": body.model or service.model,
    }  # fmt: skip
    writer = ChatWriter(body, opened, meta)
    await respond(exchange, opened.generation, writer, is_stream=bool(body.stream))


class Opened(NamedTuple):
    """A queued conversation. prompt: its rendered text."""

    generation: Generation
    reading: ToolParsing
    prompt: str


async def open_chat(service: Service, exchange: Exchange, body: ChatBody) -> Opened:
    """Queue the answers to a conversation. Raises ValueError, also as ApiError."""
    params = service.params.of_chat(body)
    asked = params.structured_outputs
    reading = service.readings.of(body, asked)
    if reading.form is not asked:
        params = replace(params, structured_outputs=reading.form)
    if reading.needs_special_tokens:
        params = replace(params, skip_special_tokens=False)
    prompt = await service.prompts.of_chat(body)
    form = "tools" if reading.form is not asked else form_field(body)
    generation = await Generation.open(service, exchange, [prompt], params, body.priority, form)
    return Opened(generation, reading, prompt.text or "")


@dataclass
class _Growing:
    """One streamed answer. has_begun: its first chunk was sent."""

    stream: AnswerStream | None
    reasoning: ReasoningTokens = field(default_factory=ReasoningTokens)
    has_begun: bool = False
    has_calls: bool = False


class ChatWriter:
    """Writes responses with OpenAI's and vLLM's fields."""

    def __init__(self, body: ChatBody, opened: Opened, meta: dict[str, Any]) -> None:
        self._body, self._meta = body, meta
        self._generation, self._reading, self._prompt = opened
        self._has_usage, self._is_continuous = usage_options(body.stream_options)
        chunk = {**meta, "object": "chat.completion.chunk"}
        self._chunks = EventEncoder(chunk, has_usage=self._has_usage)
        self._growing: dict[int, _Growing] = {}
        self._no_fields = b'"content":null' if self._reading.is_forced else b'"content":""'
        self._is_plain = not (self._is_continuous or body.return_token_ids or body.logprobs)

    def events(self, number: int, delta: Delta) -> bytes:
        growing = self._growing.get(number)
        if growing is None:
            growing = self._growing[number] = _Growing(self._reading.stream(self._prompt))
        if growing.stream is None:
            return self._event(number, delta, growing, _content(delta.text))
        parts = growing.stream.push(delta.text)
        if delta.finish_reason is not None:
            parts += growing.stream.finish()
        num = growing.reasoning.add(parts, delta.text, len(delta.token_ids))
        self._generation.num_reasoning += num
        fields = [self._fields(part, growing) for part in self._reading.kept(parts)]
        if not fields:
            fields = [b""]
        first = b"".join(
            self._chunks.plain(number, self._delta(one, growing)) for one in fields[:-1]
        )
        return first + self._event(number, delta, growing, fields[-1])

    def _event(self, number: int, delta: Delta, growing: _Growing, fields: bytes) -> bytes:
        """The event with the last fields of a delta and everything else the delta has."""
        if self._is_plain and delta.finish_reason is None:
            if not fields and growing.has_begun:
                return b""
            return self._chunks.plain(number, self._delta(fields, growing))
        is_first = not growing.has_begun
        content = self._delta(fields, growing)
        choice: dict[str, Any] = {"logprobs": self._logprobs(delta.token_ids, delta.logprobs)}
        choice["finish_reason"] = _reason(delta, growing.has_calls)
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        more = None
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if is_first:
                more = {"prompt_token_ids": self._generation.prompt_ids(number)}
        usage = self._generation.usage() if self._is_continuous else None
        return self._chunks.full(number, content, choice, usage, more)

    def _delta(self, fields: bytes, growing: _Growing) -> bytes:
        """An event's `delta` field. The first one of an answer has the role."""
        if growing.has_begun:
            return b'"delta":{%b}' % fields
        growing.has_begun = True
        return b'"delta":{"role":"assistant",%b}' % (fields or self._no_fields)

    def _fields(self, part: Part, growing: _Growing) -> bytes:
        if isinstance(part, ContentPart):
            return _content(part.text)
        if isinstance(part, ReasoningPart):
            text = msgspec.json.encode(part.text)
            # vLLM's name, and the older one that many clients read
            return b'"reasoning":%b,"reasoning_content":%b' % (text, text)
        call: dict[str, Any] = {"index": part.index}
        if isinstance(part, CallStart):
            growing.has_calls = True
            call |= {"id": part.id, "type": "function"}
            call["function"] = {"name": part.name, "arguments": ""}
        else:
            call["function"] = {"arguments": part.text}
        return b'"tool_calls":[%b]' % msgspec.json.encode(call)

    def end(self) -> bytes:
        return self._chunks.end(self._generation.usage() if self._has_usage else None)

    def whole(self, answers: Sequence[WholeAnswer]) -> dict[str, Any]:
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        found = {**self._meta, "choices": choices, "usage": self._generation.usage()}
        last = answers[0].last
        if self._body.prompt_logprobs is not None and last is not None:
            found["prompt_logprobs"] = logprobs.of_prompt(last.prompt_logprobs or [])
        if self._body.return_token_ids:
            found["prompt_token_ids"] = self._generation.prompt_ids(0)
        return found

    def _choice(self, number: int, answer: WholeAnswer) -> dict[str, Any]:
        last = answer.last
        assert last is not None
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        stream = self._reading.stream(self._prompt)
        if stream is not None:
            message |= self._parsed(stream, answer)
        choice = {
            "index": number, "message": message,
            "logprobs": self._logprobs(answer.token_ids, answer.logprobs),
            "finish_reason": _reason(last, "tool_calls" in message),
            "stop_reason": last.stop_reason,
        }  # fmt: skip
        if self._body.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def _parsed(self, stream: AnswerStream, answer: WholeAnswer) -> dict[str, Any]:
        """The message fields parsed from an answer's text."""
        text = answer.text
        parts = [*stream.push(text), *stream.finish()]
        num = ReasoningTokens().add(parts, text, len(answer.token_ids))
        self._generation.num_reasoning += num
        found = joined(self._reading.kept(parts))
        fields: dict[str, Any] = {"content": None if self._reading.is_forced else found.content}
        if found.reasoning:
            fields |= {"reasoning": found.reasoning, "reasoning_content": found.reasoning}
        if found.calls:
            fields["content"] = found.content or None
            fields["tool_calls"] = [
                {
                    "id": call.id, "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in found.calls
            ]  # fmt: skip
        return fields

    def _logprobs(self, token_ids: Sequence[int], found: Any) -> dict[str, Any] | None:
        if found is None:
            return None
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return logprobs.of_chat(token_ids, found, self._body.top_logprobs or 0, as_ids)


def _content(text: str) -> bytes:
    return b'"content":' + msgspec.json.encode(text) if text else b""


def _reason(delta: Delta, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and delta.finish_reason == "stop" else delta.finish_reason
