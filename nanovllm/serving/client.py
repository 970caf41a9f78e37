"""A client of the engine's process: checks and encodes prompts, decodes answers."""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from nanovllm.checks import InvalidValue
from nanovllm.config import EngineConfig
from nanovllm.engine.intake import Intake, checked_priority, drawn_seed
from nanovllm.engine.metrics import Metric
from nanovllm.engine.owner import Owner
from nanovllm.growing import GrowingAnswer, GrowingOutput
from nanovllm.media.given import Given
from nanovllm.outputs import RequestOutput
from nanovllm.prompts import AnyPrompt, Prompt, as_prompt
from nanovllm.replicas import setups
from nanovllm.replicas.messages import Facts, params_fields
from nanovllm.replicas.messages import metrics as load_metrics
from nanovllm.sampling import RequestOutputKind, SamplingParams
from nanovllm.schedule import edit_limits
from nanovllm.serving import messages, quota
from nanovllm.serving.answer import Answer
from nanovllm.serving.connection import Connection
from nanovllm.serving.encoding import Encoder
from nanovllm.serving.interface import Draining, EngineDead
from nanovllm.serving.messages import Add, End
from nanovllm.serving.quota import MAX_QUEUED, Counts, Quota
from nanovllm.serving.seeing import Encoded
from nanovllm.serving.stream import Feed, OpenStream
from nanovllm.tokenizer import Tokenizer


class Client:
    """An `AsyncEngine` over a socket to the engine's process.

    It belongs to the event loop in which it was first awaited: use it in tasks of that loop. Only
    `close` works everywhere. What the engine says of itself (`max_model_len`, `tokenizer`, …) is
    known once `ready` has returned.
    """

    tokenizer: Tokenizer | None
    max_model_len: int
    max_num_seqs: int
    default_params: SamplingParams
    eos_ids: frozenset[int]
    # how long to wait for the reason after the end of the connection
    _patience_s = 0.0

    def __init__(
        self,
        config: EngineConfig,
        sock: socket.socket,
        counts: Counts,
        *,
        index: int = 0,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        """Takes over the socket. index: of this client. counts: the answers of all clients.

        max_queued: how many answers of all clients may wait while as many run as can. More are
        refused with QueueFull.
        """
        self.config = config
        self._sock, self._counts, self._index = sock, counts, index
        self._max_queued = quota.checked_limit(max_queued)
        self._next_id = 0
        self._feeds: dict[str, Feed] = {}  # unfinished
        self._answers: dict[int, tuple[Feed, Answer]] = {}  # unfinished, by their ids
        self._asked: list[asyncio.Future[list[Metric]]] = []
        self._failure: EngineDead | None = None
        self._is_draining = self._is_closed = False
        self._owner = Owner()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def __getattr__(self, name: str) -> Any:
        if name in Client.__annotations__:
            raise AttributeError(f"{name} is not known before `await ready()`")
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    # start and end ----------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until the engine is warm. Raises ValueError for options that it refuses, EngineDead,
        and RuntimeError in a fork of the process or another event loop."""
        self._owner.check()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop, self._facts = loop, loop.create_future()
            self._starting = loop.create_task(self._start())
        elif self._loop is not loop:
            raise RuntimeError("this engine belongs to another event loop")
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        self._connection = await self._connected()
        reading = asyncio.to_thread(setups.tokenizer, self.config)
        facts, self.tokenizer = await asyncio.gather(self._facts, reading)
        self.max_model_len, self.max_num_seqs = facts.max_model_len, facts.max_num_seqs
        self.default_params = SamplingParams(**facts.default_params)
        self.eos_ids = frozenset(facts.eos_ids)
        self._intake = Intake(
            self.config.model,
            self.tokenizer,
            facts.vocab_size,
            facts.hidden_size,
            facts.max_model_len,
            num_added=facts.num_added,
            has_axes=facts.has_axes,
            max_grammar_bytes=self.config.max_grammar_bytes,
        )
        num_clients = quota.num_clients_of(self._counts)
        self._encoder = await Encoder.open(self.config, self._intake, facts, num_clients)
        self._quota = Quota(self._index, self._counts, self.max_num_seqs + self._max_queued)

    async def _connected(self) -> Connection:
        """The connection. It does not keep this client from being collected: its loop, which may
        run for ever, refers to it."""
        found = weakref.ref(self)

        def take(name: str, payload: bytes) -> None:
            client = found()
            if client is not None:
                client._take(name, payload)

        def lose() -> None:
            client = found()
            if client is not None:
                client._lost()

        return await Connection.open(self._sock, take, lose)

    async def close(self) -> None:
        """End all requests, the connection and what else this client has.

        It may be called in any event loop and thread, also after the end of the client's own loop,
        and again. A fork of the process leaves everything alone.
        """
        if not self._owner.is_here:
            return
        self._begin_close()
        await asyncio.to_thread(self._finish_close)

    def _begin_close(self) -> None:
        """Refuse requests from now on, and end those of tasks in the client's loop."""
        self._is_closed = True
        loop = self._loop
        if loop is None or loop.is_closed():
            self._sock.close()  # no task waits for anything
        elif loop is _running_loop():
            self._end_tasks()
        else:
            with suppress(RuntimeError):  # it has been closed meanwhile
                loop.call_soon_threadsafe(self._end_tasks)

    def _end_tasks(self) -> None:
        """End what tasks wait for. Called in the client's loop."""
        self.abort_all()
        self._starting.cancel()
        if connection := self.__dict__.get("_connection"):
            connection.close()
        if encoder := self.__dict__.get("_encoder"):
            encoder.cancel()

    def _finish_close(self) -> None:
        """Wait until the threads have ended."""
        if encoder := self.__dict__.get("_encoder"):
            encoder.close()

    async def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests with Draining, and wait for those that run or wait.

        After `timeout` seconds what is left is aborted. Returns whether nothing was.
        """
        self._is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            self.abort_all()
            return False
        return True

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def failure(self) -> EngineDead | None:
        return self._failure

    # requests ---------------------------------------------------------------------------------

    def check_media(self, media: Sequence[Given]) -> None:
        """Raises ValueError for images, videos and sound that the model or the options do not
        allow. Call it after `ready`."""
        self._encoder.check_media(media)

    async def open(
        self,
        prompt: AnyPrompt | Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> OpenStream:
        """Queue a prompt; its answers come through the stream.

        With params.output_kind FINAL_ONLY an answer is one part. Without params those of the
        checkpoint are used. Images are prepared first; cancelling the task ends that. Raises
        ValueError for an invalid prompt, for images that cannot be read and for a request_id that
        is in use, QueueFull, Draining, EngineDead.
        """
        await self.ready()
        params = self._checked(self.default_params if params is None else params)
        given, priority = as_prompt(prompt), checked_priority(priority)
        self._check_open()
        self._quota.take(params.n)  # a prompt whose images are being prepared waits, too
        encoded = Encoded([])
        try:
            encoded = await self._encoder.encode(given, params)
            self._check_open()
            name = self._checked_name(request_id)
            add = self._addition(given, params, priority, encoded)
            message = messages.dump(add)
        except BaseException:
            self._quota.give_back(params.n)
            self._encoder.release(encoded.num_bytes)
            raise
        feed = self._new_feed(name, params, add.prompt_ids, incremental=add.incremental)
        feed.num_held_bytes = encoded.num_bytes
        if encoded.beside:
            self._connection.send_packed(encoded.beside)
        self._connection.send(messages.ADD, message)
        return OpenStream(self, add.prompt_ids, feed)

    async def generate(
        self,
        prompt: AnyPrompt | Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the answers as they grow, as sampling_params.output_kind says; see `open`.

        Leaving the loop, and a cancelled task, abort the request.
        """
        await self.ready()
        params = self.default_params if sampling_params is None else sampling_params
        given = as_prompt(prompt)
        stream = await self.open(given, params, request_id=request_id, priority=priority)
        prompt_ids = stream.prompt_token_ids
        growing = GrowingOutput(stream.request_id, given.text, prompt_ids, params.output_kind)
        for index in range(params.n):
            growing.answers[index] = GrowingAnswer(index, len(prompt_ids))
        try:
            while found := await stream.take():
                output = growing.output({one.request_id: one for one in found})
                if output is not None:
                    yield output
        finally:
            stream.abort()

    def abort(self, request_id: str) -> None:
        """End a request: its readers get the end of its answers. Unknown ids are ignored."""
        if request_id in self._feeds:
            self.abort_feed(self._feeds[request_id])

    def abort_all(self) -> None:
        for feed in list(self._feeds.values()):
            self.abort_feed(feed)

    def abort_feed(self, feed: Feed) -> None:
        """End the answers of a feed that have not ended."""
        ids = [feed.first_id + answer.index for answer in feed.answers]
        unfinished = [one for one in ids if one in self._answers]
        for one in unfinished:
            _, answer = self._answers[one]
            answer.abort()
            self._finish(one, feed, answer)
        if unfinished:
            end = End(unfinished, messages.ABORT)
            self._connection.send(messages.END, messages.dump(end))

    async def metrics(self) -> list[Metric]:
        """The engine's metrics. Raises EngineDead."""
        await self.ready()
        self._check_alive()
        self._asked.append(asyncio.get_running_loop().create_future())
        if len(self._asked) == 1:
            self._connection.send(messages.METRICS)
        return await asyncio.shield(self._asked[-1])

    # inside -----------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDead(*self._failure.args)
        if self._is_closed:
            raise EngineDead("the engine is closed")

    def _check_open(self) -> None:
        self._check_alive()
        if self._is_draining:
            raise Draining("the engine finishes what runs and takes no new requests")

    def _checked(self, params: SamplingParams) -> SamplingParams:
        """A copy of valid parameters."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"the parameters are {params!r}: they must be SamplingParams")
        params = params.clone()
        self._intake.check(params)
        self._intake.source(params)
        edits = self._intake.edits(params)
        if edits is not None:
            edit_limits.check(edits, self._intake.vocab_size)
        option = self.config.replicas_option
        if option and params.stop and params.prompt_logprobs is not None:
            # a replica says no more of an answer that its front has ended
            words = f"prompt_logprobs does not go with stop and {option}"
            raise InvalidValue("prompt_logprobs", words)
        return params

    def _checked_name(self, request_id: str | None) -> str:
        name = uuid.uuid4().hex if request_id is None else request_id
        if not isinstance(name, str) or name in self._feeds:
            words = f"request_id is {name!r}: it must be text that is not in use"
            raise InvalidValue("request_id", words)
        return name

    def _addition(
        self, given: Prompt, params: SamplingParams, priority: int, encoded: Encoded
    ) -> Add:
        """The message to the engine about a new prompt."""
        incremental = bool(params.stop) or params.output_kind is not RequestOutputKind.FINAL_ONLY
        # the client detokenizes and finds stop strings, not the engine
        fields = params_fields(replace(params, n=1, seed=None, stop=None, detokenize=False))
        return Add(
            self._next_id, encoded.token_ids, fields, self._seeds(params), incremental, priority,
            given.cache_salt, bool(encoded.beside),
        )  # fmt: skip

    def _seeds(self, params: SamplingParams) -> list[int]:
        """The seeds of the n answers. Clients draw different ones; a single one those of `LLM`."""
        if params.seed is not None:
            return [one.seed for one in params.of_answers() if one.seed is not None]
        num_clients = quota.num_clients_of(self._counts)
        numbers = range(self._next_id, self._next_id + params.n)
        return [drawn_seed(self.config.seed, i * num_clients + self._index) for i in numbers]

    def _new_feed(
        self, name: str, params: SamplingParams, prompt_ids: list[int], *, incremental: bool
    ) -> Feed:
        answers = [
            Answer(index, params, prompt_ids, self.tokenizer, incremental=incremental)
            for index in range(params.n)
        ]
        self._feeds[name] = feed = Feed(name, self._next_id, answers)
        self._next_id += params.n
        self._answers |= {feed.first_id + one.index: (feed, one) for one in answers}
        self._idle.clear()
        return feed

    def _take(self, name: str, payload: bytes) -> None:
        """Take a message of the engine."""
        if name == messages.OUTPUTS:
            self._take_outputs(payload)
        elif name == messages.METRICS:
            asked, self._asked = self._asked, []
            found = load_metrics(payload)
            for one in asked:
                if not one.done():
                    one.set_result(found)
        else:
            assert name == messages.READY, name
            self._facts.set_result(Facts(**json.loads(payload)))

    def _take_outputs(self, payload: bytes) -> None:
        outputs, answers = messages.load_outputs(payload), self._answers
        stopped: list[int] = []
        for request_id, token_id in zip(outputs.ids, outputs.tokens):
            if request_id in answers:  # else the answer was aborted meanwhile
                feed, answer = answers[request_id]
                if answer.add_token(token_id):
                    stopped.append(request_id)
                feed.note(answer)
        for row in outputs.rows:
            if row.request_id in answers:
                feed, answer = answers[row.request_id]
                has_stopped = answer.add(row)
                if row.done is not None:
                    self._finish(row.request_id, feed, answer)
                elif has_stopped:
                    stopped.append(row.request_id)
                feed.note(answer)
        if stopped:
            self._connection.send(messages.END, messages.dump(End(stopped, messages.STOP)))

    def _finish(self, one: int, feed: Feed, answer: Answer) -> None:
        """Forget an answer that has ended, and its feed with its last answer."""
        del self._answers[one]
        self._quota.give_back(1)
        feed.num_unfinished -= 1
        feed.note(answer)
        if not feed.num_unfinished:
            del self._feeds[feed.name]
            self._encoder.release(feed.num_held_bytes)
        if not self._answers:
            self._idle.set()

    def _lost(self) -> None:
        """The connection has ended."""
        if not self._is_closed:
            assert self._loop is not None
            error = EngineDead("the engine's process has ended")
            self._loop.call_later(self._patience_s, self._fail, error)

    def _fail(self, error: Exception) -> None:
        """Raise the error in all waiting tasks. A ValueError is about the options."""
        if self._failure is not None:
            return
        self._failure = error if isinstance(error, EngineDead) else EngineDead(str(error))
        if not self._facts.done():
            self._facts.set_exception(error)
        for future in self._asked:
            if not future.done():
                future.set_exception(EngineDead(*self._failure.args))
        for feed in self._feeds.values():
            feed.fail(self._failure)
        self._feeds.clear()
        self._answers.clear()
        self._idle.set()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
