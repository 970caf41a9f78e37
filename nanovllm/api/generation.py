"""The engine's output for one HTTP request: the merged streams of all its prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from nanovllm.api.errors import DONE, ApiError
from nanovllm.api.http import EVENTS, JSON, NO_STORE, ClientGone, Exchange
from nanovllm.api.latencies import Timer
from nanovllm.api.prompts import beside
from nanovllm.api.service import Service
from nanovllm.api.structured import misfit
from nanovllm.checks import InvalidValue
from nanovllm.outputs import TopLogprobs
from nanovllm.prompts import Prompt, PromptRefused
from nanovllm.sampling import SamplingParams
from nanovllm.serving.async_engine import Delta, Stream
from nanovllm.structured_params import FIELD as FORM

# units of `beside`: the cost of one log-probability, and the characters of text per unit
LOGPROB_COST, TEXT_COST = 4, 8
ABORTED = "aborted"  # the code of an error
NO_BUFFER = (b"x-accel-buffering", b"no")  # a proxy must not buffer events


@dataclass
class WholeAnswer:
    """One whole answer."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] | None = None
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = [] if self.logprobs is None else self.logprobs
            self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            self.last = delta

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Writer(Protocol):
    """How an endpoint writes answers. The answers of a request are numbered, starting with those
    to the first prompt."""

    def events(self, number: int, delta: Delta) -> bytes:
        """The events for one delta."""
        ...

    def end(self) -> bytes:
        """The events after all answers."""
        ...

    def whole(self, answers: Sequence[WholeAnswer]) -> Any:
        """All answers as one JSON object."""
        ...


async def _with_media(exchange: Exchange, opening: Coroutine[Any, Any, Stream]) -> Stream:
    """The stream of a prompt with media, which take time to prepare."""
    try:
        return await exchange.unless_gone(opening)
    except InvalidValue:
        raise
    except ValueError as error:  # media name no request field
        raise PromptRefused(str(error)) from None


class Generation:
    """The streams of a request's prompts, with n answers each."""

    def __init__(
        self,
        streams: Sequence[Stream],
        num_answers: int,
        timers: Sequence[Timer],
        form: str | None = None,
    ) -> None:
        self.streams, self._num_answers, self._timers = streams, num_answers, timers
        self._form = form
        self.num_tokens = self.num_cached = 0
        self.num_reasoning = 0  # tokens; counted by writers that parse answers

    @classmethod
    async def open(
        cls,
        service: Service,
        exchange: Exchange,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        priority: int | None = None,
        form: str | None = None,
    ) -> Generation:
        """Queue all prompts or none. Raises the errors of `AsyncEngine.open`.

        form: the request field that constrains the output.
        """
        service.check_num_answers(len(prompts), params.n)
        engine, streams, prompt_lens = service.engine, list[Stream](), list[int]()
        if service.config.log_prompts:
            exchange.record.prompt = "; ".join(str(one.text or one.token_ids) for one in prompts)
        try:
            for one in prompts:
                salt = service.salts.of(exchange.api_key, one.cache_salt)
                prompt = replace(one, cache_salt=salt)
                opening = engine.open(
                    prompt, params, priority=priority or 0, lora_request=exchange.adapter
                )
                streams.append(await (_with_media(exchange, opening) if prompt.media else opening))
                prompt_lens.append(len(streams[-1].prompt_token_ids))
                service.params.check_prompt_logprobs(params, sum(prompt_lens))
                service.params.check_answer_logprobs(params, prompt_lens)
        except BaseException as error:
            for stream in streams:
                stream.abort()
            if form is not None and isinstance(error, InvalidValue) and error.field == FORM:
                raise misfit(form, str(error)) from None
            raise
        latencies, start = service.own_latencies, exchange.record.start
        timers = [latencies.timer(start) for _ in range(len(prompts) * params.n)]
        return cls(streams, params.n, timers, form)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(stream.prompt_token_ids) for stream in self.streams)

    def prompt_ids(self, number: int) -> list[int]:
        """The prompt of an answer."""
        return self.streams[number // self._num_answers].prompt_token_ids

    def usage(self) -> dict[str, Any]:
        num_prompt, num = self.num_prompt_tokens, self.num_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num,
            "total_tokens": num_prompt + num,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning},
        }

    def abort(self) -> None:
        for stream in self.streams:
            stream.abort()

    def parts(self) -> AsyncIterator[Delta]:
        """The deltas of all answers, with the answer's number as output_index. Call `note` for
        each of them."""
        # no generator around a single stream: it would cost as much as writing an event
        return self.streams[0].__aiter__() if len(self.streams) == 1 else self._merged()

    def note(self, delta: Delta) -> None:
        """Count a delta. Raises ApiError if its answer has failed."""
        number, num_tokens = delta.output_index, len(delta.token_ids)
        self.num_tokens += num_tokens
        timer = self._timers[number]
        timer.tokens(num_tokens)
        if delta.finish_reason is not None:
            timer.end()
            if number % self._num_answers == 0:
                self.num_cached += delta.num_cached_tokens
            self._check_end(delta)

    def _check_end(self, delta: Delta) -> None:
        if delta.finish_reason == "error" and delta.error_field is not None:
            # errors that only the engine process detects, such as a grammar that does not compile
            if delta.error_field == FORM and self._form is not None:
                raise misfit(self._form, str(delta.error))
            raise InvalidValue(delta.error_field, str(delta.error))
        if delta.finish_reason == "error":
            raise ApiError(500, "generation failed", code="answer_failed")
        if delta.finish_reason == "abort":
            raise ApiError(503, "the server aborted the request", code=ABORTED)

    async def _merged(self) -> AsyncIterator[Delta]:
        # back-pressure: with a queue of one, a slow reader gets larger deltas from every stream
        found: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(1)
        tasks = [
            asyncio.create_task(self._forward(index, stream, found))
            for index, stream in enumerate(self.streams)
        ]
        try:
            left = len(tasks)
            while left:
                one = await found.get()
                if isinstance(one, Exception):
                    raise one
                if one is None:
                    left -= 1
                else:
                    yield one
        finally:
            for task in tasks:
                task.cancel()

    async def _forward(self, index: int, stream: Stream, found: asyncio.Queue[Any]) -> None:
        try:
            async for delta in stream:
                delta.output_index += index * self._num_answers
                await found.put(delta)
            await found.put(None)
        except Exception as error:
            await found.put(error)

    async def answers(self) -> list[WholeAnswer]:
        """All answers, once all have finished."""
        found = [WholeAnswer() for _ in range(self._num_answers * len(self.streams))]
        async for delta in self.parts():
            self.note(delta)
            found[delta.output_index].add(delta)
        for number, one in enumerate(found):
            first = found[number - number % self._num_answers].last
            if one.last is not None and first is not None:
                one.last.prompt_logprobs = first.prompt_logprobs
        return found


async def respond(
    exchange: Exchange, generation: Generation, writer: Writer, *, is_stream: bool
) -> None:
    """Send the answers, streamed or whole. If the client disconnects, aborts them and raises
    ClientGone."""
    gone = asyncio.create_task(exchange.gone())
    gone.add_done_callback(lambda task: generation.abort())
    record = exchange.record
    try:
        if is_stream:
            await _send_events(exchange, generation, writer)
        else:
            answers = await generation.answers()
            record.has_token()
            body = await beside(
                lambda: msgspec.json.encode(writer.whole(answers)), sum(map(_size, answers))
            )
            await exchange.answer(200, body, (JSON, NO_STORE))
    except ApiError as error:
        if error.code == ABORTED and gone.done():
            raise ClientGone from None
        raise
    finally:
        gone.cancel()
        generation.abort()
        record.num_prompt_tokens = generation.num_prompt_tokens
        record.num_tokens = generation.num_tokens


def _size(answer: WholeAnswer) -> int:
    """The work of writing an answer, in the units of `beside`."""
    assert answer.last is not None
    found = (answer.logprobs, answer.last.prompt_logprobs)
    # positions have about as many as the last one
    num_logprobs = sum(len(tops) * len(tops[-1] or ()) for tops in found if tops)
    return sum(map(len, answer.texts)) // TEXT_COST + num_logprobs * LOGPROB_COST


async def _send_events(exchange: Exchange, generation: Generation, writer: Writer) -> None:
    async for delta in generation.parts():
        generation.note(delta)
        if not exchange.has_started:  # an error before this has its own status
            exchange.record.has_token()
            await exchange.start(200, [EVENTS, NO_STORE, NO_BUFFER])
        events = writer.events(delta.output_index, delta)
        if events:
            await exchange.send(events, more=True)
    await exchange.send(writer.end())


class EventEncoder:
    """The events of completions and chat. Constant parts are encoded once."""

    def __init__(self, meta: dict[str, Any], *, has_usage: bool) -> None:
        self._meta = b"data: " + msgspec.json.encode(meta)[:-1]
        self._head = self._meta + b',"choices":[{"index":'
        self._usage = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"
        self._plain = b',"logprobs":null,"finish_reason":null}' + self._usage

    def plain(self, number: int, content: bytes) -> bytes:
        """The event of a delta with only content. content: a field as JSON."""
        return b"%b%d,%b%b" % (self._head, number, content, self._plain)

    def full(
        self,
        number: int,
        content: bytes,
        others: dict[str, Any],
        usage: dict[str, Any] | None,
        more: dict[str, Any] | None = None,
    ) -> bytes:
        """The event of a delta with more fields of the choice, optionally with the usage so far.

        more: fields outside the choices.
        """
        fields = msgspec.json.encode(others)[1:]
        end = self._usage
        if usage is not None:
            end = b'],"usage":%b}\n\n' % msgspec.json.encode(usage)
        if more:
            end = b"],%b%b" % (msgspec.json.encode(more)[1:-1], end[1:])
        return b"%b%d,%b,%b%b" % (self._head, number, content, fields, end)

    def end(self, usage: dict[str, Any] | None) -> bytes:
        """The last event, preceded by a usage event if there is usage."""
        if usage is None:
            return DONE
        counts = msgspec.json.encode(usage)
        return b'%b,"choices":[],"usage":%b}\n\n%b' % (self._meta, counts, DONE)
