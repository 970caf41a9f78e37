"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, implemented on chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from nanovllm.api.anthropic_input import as_chat
from nanovllm.api.anthropic_schemas import CountTokensBody, MessagesBody
from nanovllm.api.chat import Opened, open_chat
from nanovllm.api.errors import invalid
from nanovllm.api.generation import WholeAnswer, respond
from nanovllm.api.http import Exchange
from nanovllm.api.service import Service, response_id
from nanovllm.parsers import ArgumentsPart, CallStart, ContentPart, Part, ReasoningPart
from nanovllm.serving.async_engine import Delta

REASONS = {"stop": "end_turn", "length": "max_tokens"}
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


async def messages(service: Service, exchange: Exchange) -> None:
    """POST /v1/messages."""
    body = await service.body(exchange, MessagesBody)
    if body.metadata is not None:
        exchange.record.user = body.metadata.user_id
    opened = await open_chat(service, exchange, as_chat(body, service.config.max_messages))
    writer = MessageWriter(opened, body.model or service.model)
    await respond(exchange, opened.generation, writer, is_stream=bool(body.stream))


async def count_tokens(service: Service, exchange: Exchange) -> None:
    """POST /v1/messages/count_tokens: the number of prompt tokens of a request."""
    body = await service.body(exchange, CountTokensBody)
    chat = as_chat(body, service.config.max_messages)
    service.readings.of(chat, service.params.of_chat(chat).structured_outputs)
    prompt = await service.prompts.of_chat(chat)
    if prompt.token_ids is None:
        words = "messages has images, whose tokens are only counted in the usage of a response"
        raise invalid("messages", words)
    await exchange.json({"input_tokens": len(prompt.token_ids)})


class StreamedBlock:
    """A streamed content block. kind: the class of the parts that continue it."""

    def __init__(self, index: int, part: Part) -> None:
        self._texts: list[str] = []
        if isinstance(part, CallStart):
            self.kind: type[Part] = ArgumentsPart
            self._fields: dict[str, Any] = {"type": "tool_use", "id": part.id, "name": part.name}
            self._name, delta = "input", (b"input_json_delta", b"partial_json")
        elif isinstance(part, ReasoningPart):
            self.kind = ReasoningPart
            self._fields = {"type": "thinking", "signature": ""}
            self._name, delta = "thinking", (b"thinking_delta", b"thinking")
        else:
            self.kind, self._fields = ContentPart, {"type": "text"}
            self._name, delta = "text", (b"text_delta", b"text")
        self._delta = (
            b"event: content_block_delta\n"
            b'data: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
            % (index, *delta)
        )

    def takes(self, part: Part) -> bool:
        return type(part) is self.kind

    def add(self, text: str) -> None:
        self._texts.append(text)

    def delta(self, text: str) -> bytes:
        """The event with more text."""
        return b"%b%b}}\n\n" % (self._delta, msgspec.json.encode(text))

    def empty(self) -> dict[str, Any]:
        """The block in its start event."""
        return {**self._fields, self._name: {} if self.kind is ArgumentsPart else ""}

    def whole(self) -> dict[str, Any]:
        text = "".join(self._texts)
        if self.kind is ArgumentsPart:
            return {**self._fields, "input": _object(text)}
        return {**self._fields, self._name: text}


class MessageWriter:
    """Writes a message. model: its name in the request."""

    def __init__(self, opened: Opened, model: str) -> None:
        self._generation, reading, prompt = opened
        self._reading = dataclasses.replace(reading, id_prefix="toolu_")
        self._stream = self._reading.stream(prompt)
        self._meta = {
            "id": response_id("msg_", None), "type": "message", "role": "assistant", "model": model,
        }  # fmt: skip
        self._block: StreamedBlock | None = None
        self._num_blocks = 0
        self._has_begun = self._has_calls = False
        self._last: Delta | None = None

    def events(self, number: int, delta: Delta) -> bytes:
        events = b"".join([self._more(part) for part in self._parts(delta)])
        if self._has_begun:
            return events
        self._has_begun = True
        return self._start() + events

    def _start(self) -> bytes:
        message: dict[str, Any] = {
            **self._meta, "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": self._generation.num_prompt_tokens, "output_tokens": 0},
        }  # fmt: skip
        return _event("message_start", message=message) + PING

    def _parts(self, delta: Delta) -> list[Part]:
        """The parsed parts of a delta."""
        if delta.finish_reason is not None:
            self._last = delta
        if self._stream is None:
            return [ContentPart(delta.text)] if delta.text else []
        parts = self._stream.push(delta.text)
        if delta.finish_reason is not None:
            parts += self._stream.finish()
        return list(self._reading.kept(parts))

    def _begun(self, part: Part) -> StreamedBlock:
        """The block that a part opens."""
        self._has_calls |= isinstance(part, CallStart)
        self._block = StreamedBlock(self._num_blocks, part)
        self._num_blocks += 1
        return self._block

    def _more(self, part: Part) -> bytes:
        block, events = self._block, b""
        if block is None or not block.takes(part):
            events = self._close()
            block = self._begun(part)
            index = self._num_blocks - 1
            events += _event("content_block_start", index=index, content_block=block.empty())
        return events if isinstance(part, CallStart) else events + block.delta(part.text)

    def _close(self) -> bytes:
        if self._block is None:
            return b""
        return _event("content_block_stop", index=self._num_blocks - 1)

    def end(self) -> bytes:
        changed = _event("message_delta", delta=self._reason(), usage=self._usage())
        return self._close() + changed + _event("message_stop")

    def whole(self, answers: Sequence[WholeAnswer]) -> dict[str, Any]:
        last = answers[0].last
        assert last is not None
        blocks: list[StreamedBlock] = []
        for part in self._parts(dataclasses.replace(last, text=answers[0].text)):
            if not blocks or not blocks[-1].takes(part):
                blocks.append(self._begun(part))
            if not isinstance(part, CallStart):
                blocks[-1].add(part.text)
        content = [block.whole() for block in blocks]
        return {**self._meta, "content": content, **self._reason(), "usage": self._usage()}

    def _reason(self) -> dict[str, Any]:
        last = self._last
        assert last is not None and last.finish_reason is not None
        reason, text = REASONS[last.finish_reason], None
        if self._has_calls and last.finish_reason == "stop":
            reason = "tool_use"
        elif isinstance(last.stop_reason, str):
            reason, text = "stop_sequence", last.stop_reason
        return {"stop_reason": reason, "stop_sequence": text}

    def _usage(self) -> dict[str, int]:
        counts = self._generation
        return {
            "input_tokens": counts.num_prompt_tokens - counts.num_cached,
            "cache_read_input_tokens": counts.num_cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": counts.num_tokens,
        }


def _object(text: str) -> dict[str, Any]:
    """The input of a call; {} if a truncated answer left no JSON object."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _event(kind: str, /, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (
        kind.encode(),
        msgspec.json.encode({"type": kind, **fields}),
    )
