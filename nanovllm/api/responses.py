"""POST /v1/responses: text, whole or streamed. The server keeps nothing between requests."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from nanovllm.api.bodies import ResponsesBody
from nanovllm.api.errors import invalid
from nanovllm.api.generation import Answer, Generation, respond
from nanovllm.api.http import Exchange
from nanovllm.api.service import Service, response_id
from nanovllm.api.tools import Reading
from nanovllm.parsers import Part, ReasoningPart
from nanovllm.sampling import SamplingParams
from nanovllm.serving.interface import Delta

# parts of messages here, and in chat
TEXTS = ("input_text", "output_text", "text")
ITEM_KEYS = ("type", "role", "content", "id", "status")


async def responses(service: Service, exchange: Exchange) -> None:
    body = await service.body(exchange, ResponsesBody)
    params = service.params.of_response(body)
    # an answer that has a form begins with it
    reading = service.readings.of_text() if params.structured_outputs is None else Reading()
    if reading.needs_special_tokens:
        params.skip_special_tokens = False
    messages = _messages(body)
    prompt = await service.prompts.conversation(messages, None, None, None, {})
    generation = await Generation.open(service, exchange, [prompt], params)
    about = _about(body, params, body.model or service.model)
    writer = ResponseWriter(about, reading, prompt.text or "", generation)
    await respond(exchange, generation, writer, is_stream=bool(body.stream))


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """The conversation as chat has it. Raises ApiError."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for number, item in enumerate(body.input):
        place = f"input[{number}]"
        if item.get("type", "message") != "message":
            words = f"{place}.type is not supported: only messages are"
            raise invalid(f"{place}.type", words, "unsupported_parameter")
        for key in item:
            if key not in ITEM_KEYS:
                words = f"{place} has a field that is not supported"
                raise invalid(f"{place}.{key[:64]}", words, "unsupported_parameter")
        content = item.get("content")
        if isinstance(content, list):
            content = [_part(f"{place}.content[{i}]", part) for i, part in enumerate(content)]
        messages.append({"role": item.get("role"), "content": content})
    return messages


def _part(place: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        url = {"url": part["image_url"], "detail": part.get("detail", "auto")}
        return {"type": "image_url", "image_url": url}
    words = f"{place} must be of the type input_text, output_text or input_image"
    raise invalid(place, words, "unsupported_parameter")


def _about(body: ResponsesBody, params: SamplingParams, model: str) -> dict[str, Any]:
    """The fields of a response that are known before its answer."""
    text: Any = {"format": {"type": "text"}}
    if body.text is not None and body.text.format is not None:
        given = msgspec.to_builtins(body.text.format)
        text = {"format": {key: value for key, value in given.items() if value is not None}}
    return {
        "id": response_id("resp_", None), "object": "response", "created_at": int(time.time()),
        "model": model, "instructions": body.instructions, "metadata": body.metadata or {},
        "temperature": params.temperature, "top_p": params.top_p, "text": text,
        "max_output_tokens": body.max_output_tokens, "tools": [], "tool_choice": "none",
        "parallel_tool_calls": False, "previous_response_id": None, "store": False,
        "truncation": "disabled", "user": body.user, "error": None, "incomplete_details": None,
    }  # fmt: skip


class _Item:
    """An item of the output as it grows: a message, or the reasoning before it."""

    def __init__(self, index: int, *, is_reasoning: bool) -> None:
        self.index, self.is_reasoning = index, is_reasoning
        self.id = f"{'rs' if is_reasoning else 'msg'}_{secrets.token_hex(16)}"
        self.name = "response.reasoning_text" if is_reasoning else "response.output_text"
        self.texts: list[str] = []

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}

    def content(self) -> dict[str, Any]:
        text = "".join(self.texts)
        if self.is_reasoning:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def fields(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.content()]
        if self.is_reasoning:
            return {
                "type": "reasoning", "id": self.id, "status": status, "summary": [],
                "content": content,
            }  # fmt: skip
        return {
            "type": "message", "id": self.id, "status": status, "role": "assistant",
            "content": content,
        }  # fmt: skip


class ResponseWriter:
    """Writes a response. about: its fields that are known before its answer."""

    def __init__(
        self, about: dict[str, Any], reading: Reading, prompt: str, generation: Generation
    ) -> None:
        self._about, self._generation = about, generation
        self._stream = reading.stream(prompt)
        self._items: list[_Item] = []
        self._num_events = 0
        self._last: Delta | None = None

    def events(self, number: int, delta: Delta) -> bytes:
        found = []
        if not self._num_events:
            for name in ("response.created", "response.in_progress"):
                found.append(self._event(name, response=self._response("in_progress")))
        found += [self._more(text, is_reasoning) for is_reasoning, text in self._parts(delta)]
        if delta.finish_reason is not None:
            self._last = delta
        return b"".join(found)

    def end(self) -> bytes:
        closed = self._close() if self._items else b""
        status = self._status()
        return closed + self._event(f"response.{status}", response=self._response(status))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        self._last = answers[0].last
        assert self._last is not None
        whole = Delta(0, answers[0].text, [], finish_reason=self._last.finish_reason)
        for is_reasoning, text in self._parts(whole):
            self._item(is_reasoning).texts.append(text)
        return self._response(self._status())

    def _parts(self, delta: Delta) -> list[tuple[bool, str]]:
        """(whether it is reasoning, text) of what a part of the answer has."""
        if self._stream is None:
            return [(False, delta.text)] if delta.text else []
        parts: list[Part] = self._stream.push(delta.text)
        if delta.finish_reason is not None:
            parts += self._stream.finish()
        return [(isinstance(one, ReasoningPart), getattr(one, "text", "")) for one in parts]

    def _item(self, is_reasoning: bool) -> _Item:
        """The item that text belongs to, perhaps a new one."""
        if not self._items or self._items[-1].is_reasoning != is_reasoning:
            self._items.append(_Item(len(self._items), is_reasoning=is_reasoning))
        return self._items[-1]

    def _more(self, text: str, is_reasoning: bool) -> bytes:
        before = self._items[-1] if self._items else None
        found = b""
        if before is not None and before.is_reasoning != is_reasoning:
            found = self._close()
        item = self._item(is_reasoning)
        if item is not before:
            found += self._event(
                "response.output_item.added", output_index=item.index,
                item=item.fields("in_progress"),
            )  # fmt: skip
            found += self._event(
                "response.content_part.added", **item.place, part=item.content()
            )  # fmt: skip
        item.texts.append(text)
        return found + self._event(f"{item.name}.delta", **item.place, delta=text, logprobs=[])

    def _close(self) -> bytes:
        """The events at the end of the newest item."""
        item = self._items[-1]
        text = "".join(item.texts)
        return b"".join((
            self._event(f"{item.name}.done", **item.place, text=text, logprobs=[]),
            self._event("response.content_part.done", **item.place, part=item.content()),
            self._event(
                "response.output_item.done", output_index=item.index,
                item=item.fields(self._status()),
            ),
        ))  # fmt: skip

    def _event(self, name: str, **fields: Any) -> bytes:
        fields |= {"type": name, "sequence_number": self._num_events}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(fields))

    def _status(self) -> str:
        is_cut = self._last is not None and self._last.finish_reason == "length"
        return "incomplete" if is_cut else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        response = {**self._about, "status": status, "output": [], "usage": None}
        if status == "in_progress":
            return response
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        counts = self._generation
        num_prompt, num = counts.num_prompt_tokens, counts.num_tokens
        response["output"] = [item.fields(status) for item in self._items]
        response["usage"] = {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": counts.num_cached, "cache_write_tokens": 0},
            "output_tokens": num,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_prompt + num,
        }
        return response
