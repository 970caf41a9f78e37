"""POST /v1/responses: text and tool calls, whole or streamed.

The server keeps no state between requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from nanovllm.api.errors import ApiError, invalid
from nanovllm.api.generation import Generation, WholeAnswer, respond
from nanovllm.api.http import Exchange
from nanovllm.api.prompts import with_effort
from nanovllm.api.reasoning_tokens import ReasoningTokens
from nanovllm.api.response_input import as_chat, messages_of
from nanovllm.api.response_items import CallItem, TextItem, item_for
from nanovllm.api.schemas import InputTokensBody, ResponsesBody
from nanovllm.api.service import Service, response_id
from nanovllm.api.structured import form_field
from nanovllm.api.tools import ToolParsing
from nanovllm.parsers import CallStart, ContentPart, Part
from nanovllm.prompts import Prompt
from nanovllm.sampling import SamplingParams
from nanovllm.serving.async_engine import Delta
from nanovllm.structured_params import StructuredOutputsParams


async def responses(service: Service, exchange: Exchange) -> None:
    body = await service.body(exchange, ResponsesBody)
    params = service.params.of_response(body)
    asked = params.structured_outputs
    reading, prompt = await _read(service, body, asked)
    if reading.form is not asked:
        params.structured_outputs = reading.form
    if reading.needs_special_tokens:
        params.skip_special_tokens = False
    form = "tools" if reading.form is not asked else form_field(body)
    generation = await Generation.open(service, exchange, [prompt], params, form=form)
    about = _about(body, params, body.model or service.model)
    writer = ResponseWriter(about, reading, prompt.text or "", generation)
    exchange.error_events = writer.error
    await respond(exchange, generation, writer, is_stream=bool(body.stream))


async def input_tokens(service: Service, exchange: Exchange) -> None:
    """POST /v1/responses/input_tokens: the number of prompt tokens of a request."""
    body = await service.body(exchange, InputTokensBody)
    asked = service.params.of_response(body).structured_outputs
    _, prompt = await _read(service, body, asked)
    if prompt.token_ids is None:
        words = "input has images, whose tokens are only counted in the usage of a response"
        raise invalid("input", words)
    num = len(prompt.token_ids)
    await exchange.json({"object": "response.input_tokens", "input_tokens": num})


async def _read(
    service: Service, body: ResponsesBody, asked: StructuredOutputsParams | None
) -> tuple[ToolParsing, Prompt]:
    """How to parse the answer; the prompt."""
    try:
        as_in_chat = as_chat(body)
        reading = service.readings.of(as_in_chat, asked)
        messages = messages_of(body, service.config.max_messages)
        tools = None if body.tool_choice == "none" else as_in_chat.tools
        effort = None if body.reasoning is None else body.reasoning.effort
        variables = with_effort(effort, {})
        prompt = await service.prompts.conversation(messages, None, None, tools, variables)
    except ApiError as error:
        error.param = _own_name(error.param or "")
        raise
    return reading, prompt


def _own_name(field: str) -> str:
    """The Responses API's name for a field of chat."""
    if field.startswith("messages"):
        return "input"
    if field == "reasoning_effort":
        return "reasoning.effort"
    return field.replace(".function.", ".", 1) if field.startswith("tools") else field


def _about(body: ResponsesBody, params: SamplingParams, model: str) -> dict[str, Any]:
    """The fields of a response that do not depend on the output."""
    text: Any = {"format": {"type": "text"}}
    if body.text is not None and body.text.format is not None:
        given = msgspec.to_builtins(body.text.format)
        text = {"format": {key: value for key, value in given.items() if value is not None}}
    return {
        "id": response_id("resp_", None), "object": "response", "created_at": int(time.time()),
        "model": model, "instructions": body.instructions, "metadata": body.metadata or {},
        "temperature": params.temperature, "top_p": params.top_p, "text": text,
        "max_output_tokens": body.max_output_tokens, "tools": body.tools or [],
        "tool_choice": body.tool_choice or ("auto" if body.tools else "none"),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None, "store": False,
        "truncation": "disabled", "user": body.user, "error": None, "incomplete_details": None,
    }  # fmt: skip


class ResponseWriter:
    """Writes a response. about: its fields that do not depend on the output."""

    def __init__(
        self, about: dict[str, Any], reading: ToolParsing, prompt: str, generation: Generation
    ) -> None:
        self._about, self._generation = about, generation
        self._reading, self._stream = reading, reading.stream(prompt)
        self._reasoning = ReasoningTokens()
        self._items: list[TextItem | CallItem] = []
        self._num_events = 0
        self._last: Delta | None = None

    def events(self, number: int, delta: Delta) -> bytes:
        found = []
        if not self._num_events:
            for name in ("response.created", "response.in_progress"):
                found.append(self._event(name, response=self._response("in_progress")))
        found += [self._more(part) for part in self._parts(delta)]
        if delta.finish_reason is not None:
            self._last = delta
        return b"".join(found)

    def end(self) -> bytes:
        closed = self._close(self._items[-1]) if self._items else b""
        status = self._status()
        return closed + self._event(f"response.{status}", response=self._response(status))

    def error(self, error: ApiError) -> bytes:
        """The last event of a stream that fails."""
        fields = error.content()["error"]
        del fields["type"]  # the event's is "error"
        return self._event("error", **fields)

    def whole(self, answers: Sequence[WholeAnswer]) -> dict[str, Any]:
        self._last = answers[0].last
        assert self._last is not None
        text, token_ids = answers[0].text, answers[0].token_ids
        whole = Delta(0, text, token_ids, finish_reason=self._last.finish_reason)
        for part in self._parts(whole):
            item = self._item(part)
            if not isinstance(part, CallStart):
                item.add(part)
        return self._response(self._status())

    def _parts(self, delta: Delta) -> list[Part]:
        """The parsed parts of a delta."""
        if self._stream is None:
            return [ContentPart(delta.text)] if delta.text else []
        parts = self._stream.push(delta.text)
        if delta.finish_reason is not None:
            parts += self._stream.finish()
        num = self._reasoning.add(parts, delta.text, len(delta.token_ids))
        self._generation.num_reasoning += num
        return list(self._reading.kept(parts))

    def _item(self, part: Part) -> TextItem | CallItem:
        """The item that a part belongs to; a new one if necessary."""
        if not self._items or not self._items[-1].takes(part):
            self._items.append(item_for(len(self._items), part))
        return self._items[-1]

    def _more(self, part: Part) -> bytes:
        before = self._items[-1] if self._items else None
        item = self._item(part)
        found = []
        if item is not before:
            if before is not None:
                found.append(self._close(before))
            found.append(self._item_event("added", item, "in_progress"))
            if isinstance(item, TextItem):
                found.append(self._content_event("added", item))
        if not isinstance(part, CallStart):
            fields = {**item.place, "delta": item.add(part)}
            if isinstance(item, TextItem):
                fields["logprobs"] = []
            found.append(self._event(f"{item.event}.delta", **fields))
        return b"".join(found)

    def _close(self, item: TextItem | CallItem) -> bytes:
        """The events that end an item."""
        found = [self._event(f"{item.event}.done", **item.place, **item.done())]
        if isinstance(item, TextItem):
            found.append(self._content_event("done", item))
        return b"".join((*found, self._item_event("done", item, self._status_of(item))))

    def _item_event(self, name: str, item: TextItem | CallItem, status: str) -> bytes:
        return self._event(
            f"response.output_item.{name}", output_index=item.index, item=item.fields(status)
        )

    def _content_event(self, name: str, item: TextItem) -> bytes:
        return self._event(f"response.content_part.{name}", **item.place, part=item.content())

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        fields |= {"type": kind, "sequence_number": self._num_events}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(fields))

    def _status_of(self, item: TextItem | CallItem) -> str:
        """The status of an item. Only the last one can be incomplete, unless it is a whole call."""
        is_last = item is self._items[-1]
        return self._status() if is_last and not item.is_whole else "completed"

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
        response["output"] = [item.fields(self._status_of(item)) for item in self._items]
        response["usage"] = {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": counts.num_cached, "cache_write_tokens": 0},
            "output_tokens": num,
            "output_tokens_details": {"reasoning_tokens": counts.num_reasoning},
            "total_tokens": num_prompt + num,
        }
        return response
