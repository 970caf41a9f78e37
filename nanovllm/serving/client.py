"""A client of engine processes: checks and encodes prompts, decodes tokens."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nanovllm.checks import InvalidValue
from nanovllm.config import EngineConfig
from nanovllm.engine.input_processor import InputProcessor, drawn_seed
from nanovllm.engine.metrics import Metric
from nanovllm.engine.owner import OwnerProcess
from nanovllm.engine.request import EngineRequest
from nanovllm.lora_request import FIELD, LoRARequest, checked
from nanovllm.media.mm_inputs import MMInput
from nanovllm.output_stream import StreamedAnswer, StreamedOutput
from nanovllm.outputs import RequestOutput
from nanovllm.pooling_params import PoolingInfo, PoolingParams
from nanovllm.prompts import AnyPrompt, Prompt, as_prompt
from nanovllm.replicas import child_config, messages
from nanovllm.replicas.messages import Add
from nanovllm.sampling import SamplingParams
from nanovllm.serving import admission
from nanovllm.serving.admission import MAX_QUEUED, Admission, Counts
from nanovllm.serving.answer import Answer
from nanovllm.serving.async_engine import Draining, EngineDead
from nanovllm.serving.dispatcher import AnswerDispatcher, Parcel
from nanovllm.serving.encoding import Encoder
from nanovllm.serving.engine_connections import EngineConnections, Events
from nanovllm.serving.stream import OpenStream, RequestState
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.pooling_outputs import PoolingOutput, PoolingRequestOutput

CLOSED = "the engine is closed"


class Client:
    """An `AsyncEngine` over sockets to engine processes: one engine, or its replicas.

    An answer comes from one engine. If that is lost, it ends with an error, or is tried again if it
    has no tokens yet (`AnswerDispatcher`). The engine takes requests again once it has been started
    again. If it does not start, or is alone, the client fails.

    A client belongs to the event loop in which it is first awaited: use it in tasks of that loop.
    Only `close` works everywhere. The engine's properties (`max_model_len`, `tokenizer`, …) are
    available once `ready` has returned.
    """

    tokenizer: Tokenizer | None
    max_model_len: int
    max_num_seqs: int
    default_params: SamplingParams
    eos_ids: frozenset[int]
    pooling: PoolingInfo | None
    # how long to wait for the reason after a lost connection
    _patience_s = 0.0

    def __init__(
        self,
        config: EngineConfig,
        socks: Sequence[socket.socket],
        counts: Counts,
        *,
        index: int = 0,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        """Takes over the sockets, those of `EngineProcess.clients`. index: of this client. counts:
        the answers of all clients.

        max_queued: the maximum number of answers of all clients that may wait while the engines are
        full. More are refused with QueueFull.
        """
        self.config = config
        self._counts, self._index = counts, index
        self._max_queued = admission.checked_limit(max_queued)
        self._next_id = 0
        self._feeds: dict[str, RequestState] = {}  # unfinished
        # requests that are not sent yet, and whether they have been aborted
        self._opening: dict[str, bool] = {}
        events = Events(
            self._take_outputs, self._lost_engine, self._restarted_engine, self._ended_parent
        )
        self._engines = EngineConnections(socks, events)
        self._dispatcher = AnswerDispatcher(self._engines)
        self._answers = self._dispatcher.answers
        self._failure: EngineDead | None = None
        self._is_draining = self._is_closed = False
        self._owner = OwnerProcess()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def __getattr__(self, name: str) -> Any:
        if name in Client.__annotations__:
            raise AttributeError(f"{name} is not available before `await ready()`")
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    # start and end ----------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until the engine is warm. Raises ValueError for options that it refuses, EngineDead,
        and RuntimeError in a fork of the process or in another event loop."""
        self._owner.check()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._check_alive()
            self._loop = loop
            self._starting = loop.create_task(self._start())
        elif self._loop is not loop:
            raise RuntimeError("this engine belongs to another event loop")
        if not self._starting.done():
            await asyncio.wait([self._starting])
        if self._starting.cancelled():  # by `close`, unlike the task that waits
            raise EngineDead(CLOSED)
        self._starting.result()

    async def _start(self) -> None:
        await self._engines.open()
        reading = asyncio.to_thread(child_config.tokenizer, self.config)
        infos, self.tokenizer = await asyncio.gather(self._engines.infos(), reading)
        first = infos[0]
        self.max_model_len, self._block_size = first.max_model_len, first.block_size
        self.max_num_seqs = sum(one.max_num_seqs for one in infos)
        self.default_params = SamplingParams(**first.default_params)
        self.eos_ids, self.pooling = frozenset(first.eos_ids), first.pooling
        self._intake = InputProcessor.of(self.config, self.tokenizer, first)
        capacities = [one.num_blocks for one in infos]
        if len(infos) > 1:  # else there is nothing to balance
            self._dispatcher.places = admission.places(self._counts, self._index, capacities)
        num_clients = admission.num_clients_of(self._counts)
        self._encoder = await Encoder.open(self.config, self._intake, first, num_clients)
        self._quota = Admission(self._index, self._counts, self.max_num_seqs + self._max_queued)

    async def close(self) -> None:
        """Abort all requests, close the connections and free everything else.

        May be called in any event loop and thread, after the client's own loop has ended, and more
        than once. In a fork of the process it does nothing.
        """
        if not self._owner.is_here:
            return
        self._begin_close()
        await asyncio.to_thread(self._finish_close)

    def _begin_close(self) -> None:
        """Refuse new requests, and end those of tasks in the client's loop."""
        self._is_closed = True
        loop = self._loop
        if loop is None or loop.is_closed():
            self._engines.close_sockets()
        elif loop is _running_loop():
            self._end_tasks()
        else:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._end_tasks)

    def _end_tasks(self) -> None:
        """End everything that tasks wait for. Called in the client's loop."""
        self.abort_all()
        self._starting.cancel()
        self._engines.fail(EngineDead(CLOSED), EngineDead(CLOSED))
        self._engines.close()
        if encoder := self.__dict__.get("_encoder"):
            encoder.cancel()

    def _finish_close(self) -> None:
        """Wait for the threads to end."""
        if encoder := self.__dict__.get("_encoder"):
            encoder.close()

    async def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests with Draining, and wait for running and waiting ones.

        After `timeout` seconds the rest is aborted. Returns whether nothing was aborted.
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

    def check_media(self, media: Sequence[MMInput]) -> None:
        """Raises ValueError for media that the model or the options do not allow. Call it after
        `ready`."""
        self._encoder.check_media(media)

    async def open(
        self,
        prompt: AnyPrompt | Prompt,
        params: SamplingParams | PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> OpenStream:
        """Queue a prompt; its answers come through the stream.

        With params.output_kind FINAL_ONLY an answer is a single delta, unless it has stop strings
        or log-probabilities. Without params the checkpoint's defaults are used. With
        `PoolingParams` the answer is the result of a model that pools, in a single delta. Media
        are prepared first; cancelling the task stops that.
        Raises ValueError for an invalid prompt, unreadable media or a request_id in use, and
        QueueFull, Draining, Unavailable, EngineDead.
        """
        name = self._checked_name(request_id)
        self._opening[name] = False
        try:
            await self.ready()
            return await self._open(name, prompt, params, priority, lora_request)
        finally:
            del self._opening[name]

    async def _open(
        self,
        name: str,
        prompt: AnyPrompt | Prompt,
        params: SamplingParams | PoolingParams | None,
        priority: int,
        lora_request: LoRARequest | None,
    ) -> OpenStream:
        params = self._checked(self.default_params if params is None else params)
        given = as_prompt(prompt)
        num = 1 if isinstance(params, PoolingParams) else params.n
        self._check_open()
        self._quota.take(num)  # prompts whose media are being prepared count as waiting
        key: object | None = None
        try:
            asked, media, key = await self._encoder.encode(given, params, priority, lora_request)
            self._check_open()
            feed = self._new_feed(name, asked)
            feed.media_key = key
            if self._opening[name]:
                self._end_unsent(feed)
            else:
                self._send(feed, asked, media)
        except BaseException:
            self._quota.give_back(num)
            self._encoder.release(key)
            raise
        return OpenStream(self, asked.prompt_ids, feed)

    async def generate(
        self,
        prompt: AnyPrompt | Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield outputs as they grow, according to sampling_params.output_kind; see `open`.

        Leaving the loop or cancelling the task aborts the request.
        """
        given = as_prompt(prompt)
        stream = await self.open(
            given, sampling_params, request_id=request_id, priority=priority,
            lora_request=lora_request,
        )  # fmt: skip
        params = self.default_params if sampling_params is None else sampling_params
        prompt_ids = stream.prompt_token_ids
        growing = StreamedOutput(
            stream.request_id, given.text, prompt_ids, params.output_kind, lora_request
        )
        for index in range(params.n):
            growing.answers[index] = StreamedAnswer(index, len(prompt_ids))
        try:
            while found := await stream.take():
                output = growing.output({one.request_id: one for one in found})
                if output is not None:
                    yield output
        finally:
            stream.abort()

    async def encode(
        self,
        prompt: AnyPrompt | Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[PoolingRequestOutput[PoolingOutput]]:
        """Yield the result of a model that pools; see `open`. Raises PoolingFailed if there is
        none."""
        from nanovllm.pooling_outputs import pooling_output  # imports torch

        stream = await self.open(
            prompt, pooling_params or PoolingParams(), request_id=request_id, priority=priority
        )
        try:
            for one in await stream.take():
                assert one.completion is not None
                yield pooling_output(stream.request_id, one.completion)
        finally:
            stream.abort()

    def abort(self, request_id: str) -> None:
        """Abort a request; its stream ends. Unknown ids are ignored."""
        if request_id in self._opening:
            self._opening[request_id] = True
        if request_id in self._feeds:
            self.abort_feed(self._feeds[request_id])

    def abort_all(self) -> None:
        for name in self._opening:
            self._opening[name] = True
        for feed in list(self._feeds.values()):
            self.abort_feed(feed)

    def abort_feed(self, feed: RequestState) -> None:
        """Abort the unfinished answers of a request."""
        ids = [feed.first_id + answer.index for answer in feed.answers]
        unfinished = [one for one in ids if one in self._answers]
        self._dispatcher.send_ends(unfinished, messages.ABORT)
        for one in unfinished:
            self._answers[one].answer.end("abort")
            self._finish(one)

    async def metrics(self) -> list[Metric]:
        """The summed metrics of all engines. Raises EngineDead."""
        await self.ready()
        self._check_alive()
        return await self._engines.metrics()

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Check an adapter and begin to read it, before a request names it. Returns True.

        Raises ValueError if the files are damaged, not supported or do not fit the model, and
        EngineDead.
        """
        await self.ready()
        checked(lora_request, is_enabled=self.config.enable_lora)
        await self._ask_lora(messages.ADD_LORA, messages.dump(lora_request))
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter; False if it is not known. Raises ValueError while requests use it, and
        EngineDead."""
        await self.ready()
        return await self._ask_lora(messages.REMOVE_LORA, messages.dump(lora_id))

    async def _ask_lora(self, name: str, payload: bytes) -> bool:
        self._check_alive()
        replies = await self._engines.ask_lora(name, payload)
        if error := next((one.error for one in replies if one.error is not None), None):
            raise InvalidValue(FIELD, error)
        return any(one.found for one in replies)

    # inside -----------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDead(*self._failure.args)
        if self._is_closed:
            raise EngineDead(CLOSED)

    def _check_open(self) -> None:
        self._check_alive()
        if self._is_draining:
            raise Draining("the engine is draining and accepts no new requests")

    def _checked(self, params: SamplingParams | PoolingParams) -> SamplingParams | PoolingParams:
        """The same parameters. Raises ValueError if the engine refuses them."""
        if isinstance(params, PoolingParams):
            return params  # `InputProcessor.pooling_request` checks them
        if not isinstance(params, SamplingParams):
            raise ValueError(f"the parameters are {params!r}: they must be SamplingParams")
        self._intake.check(params)
        self._encoder.check_forms(params)
        option = self.config.replicas_option
        is_relayed = option and len(self._engines) == 1
        if is_relayed and params.stop and params.prompt_logprobs is not None:
            # the router stops forwarding an answer once a client ends it
            words = f"prompt_logprobs cannot be combined with stop and {option}"
            raise InvalidValue("prompt_logprobs", words)
        return params

    def _checked_name(self, request_id: str | None) -> str:
        name = uuid.uuid4().hex if request_id is None else request_id
        if not isinstance(name, str) or name in self._feeds or name in self._opening:
            words = f"request_id is {name!r}: it must be text and not in use"
            raise InvalidValue("request_id", words)
        return name

    def _seeds(self, params: SamplingParams) -> list[int]:
        """The seeds of the n answers. Each client draws its own; a single one draws `LLM`'s."""
        if params.seed is not None:
            return [one.seed for one in params.of_answers() if one.seed is not None]
        num_clients = admission.num_clients_of(self._counts)
        numbers = range(self._next_id, self._next_id + params.n)
        return [drawn_seed(self.config.seed, i * num_clients + self._index) for i in numbers]

    def _new_feed(self, name: str, asked: EngineRequest) -> RequestState:
        params = asked.params
        answers = [
            Answer(
                index,
                params,
                asked.prompt_ids,
                self.tokenizer,
                incremental=asked.incremental,
                eos_ids=self.eos_ids,
            )
            for index in range(params.n)
        ]
        return RequestState(name, self._next_id, answers)

    def _send(self, feed: RequestState, asked: EngineRequest, media: bytes) -> None:
        """Send a request's answers to their engines, one message per engine."""
        params, num_prompt = asked.params, len(asked.prompt_ids)
        seeds = self._seeds(params)
        cost = num_prompt + self._intake.max_output(params, num_prompt)
        fields = messages.packed_params(params, detokenizes=False)
        add = Add(
            list(range(feed.first_id, feed.first_id + params.n)), seeds, asked.prompt_ids, fields,
            asked.incremental, asked.priority, asked.cache_salt, has_media=bool(media),
            adapter=asked.adapter, pooling=asked.pooling, second_at=asked.second_at,
            prompt_logprobs=params.prompt_logprobs,
        )  # fmt: skip
        digests = []
        if len(self._engines) > 1 and self.config.enable_prefix_caching:
            digests = asked.block_digests(self._block_size)
        self._dispatcher.send(feed, Parcel(add, media, digests, cost))
        self._next_id += params.n
        self._feeds[feed.name] = feed
        self._idle.clear()

    def _end_unsent(self, feed: RequestState) -> None:
        """End the answers of a request that was aborted before it could be sent."""
        self._next_id += len(feed.answers)  # no other answers may have their ids
        self._quota.give_back(len(feed.answers))
        self._encoder.release(feed.media_key)
        for answer in feed.answers:
            answer.end("abort")
            feed.note(answer)

    def _take_outputs(self, engine: int, payload: bytes) -> None:
        outputs, answers = messages.load_outputs(payload), self._answers
        stopped: list[int] = []
        for request_id, token_id in zip(outputs.ids, outputs.tokens):
            if request_id in answers:  # else the answer has been aborted
                found = answers[request_id]
                found.parcel = None  # it is not sent again
                if found.answer.add_token(token_id):
                    stopped.append(request_id)
                found.feed.note(found.answer)
        for row in outputs.rows:
            if row.request_id in answers:
                found = answers[row.request_id]
                found.parcel = None
                has_stopped = found.answer.add(row)
                if row.done is not None:
                    self._finish(row.request_id)
                elif has_stopped:
                    stopped.append(row.request_id)
                found.feed.note(found.answer)
        # one message may have both a stop string's last token and the answer's end
        self._dispatcher.send_ends([one for one in stopped if one in answers], messages.STOP)

    def _finish(self, one: int) -> None:
        """Remove an answer that has ended; with the last one also its feed."""
        found = self._dispatcher.finish(one)
        feed = found.feed
        self._quota.give_back(1)
        feed.num_unfinished -= 1
        feed.note(found.answer)
        if not feed.num_unfinished:
            del self._feeds[feed.name]
            self._encoder.release(feed.media_key)
        if not self._answers:
            self._idle.set()

    def _lost_engine(self, index: int) -> None:
        """Handle the end of the connection to an engine."""
        if self._is_closed:
            return
        if not self._dispatcher.places:  # it is the only one, or has not started
            self._lost_all()
            return
        self._engines[index].rest()
        for one in self._dispatcher.lost(index):
            self._answers[one].answer.end("error", f"replica {index} has ended: see the log")
            self._finish(one)

    def _restarted_engine(self, index: int) -> None:
        self._dispatcher.restarted(index)

    def _ended_parent(self) -> None:
        if not self._is_closed:
            self._lost_all()

    def _lost_all(self) -> None:
        """No engine is left."""
        self._engines.lose_all()
        assert self._loop is not None
        error = EngineDead("the engine process has ended")
        self._loop.call_later(self._patience_s, self._fail, error)

    def _fail(self, error: Exception) -> None:
        """Raise the error in all waiting tasks. A ValueError is about options."""
        if self._failure is not None:
            return
        self._failure = error if isinstance(error, EngineDead) else EngineDead(str(error))
        self._engines.fail(error, self._failure)
        for feed in self._feeds.values():
            feed.fail(self._failure)
        self._feeds.clear()
        self._answers.clear()
        self._idle.set()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop running in this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
