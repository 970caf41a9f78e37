"""A router for replicas of an engine in other processes, with the interface of one engine."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nanovllm.checks import WorkFailed
from nanovllm.config import EngineConfig
from nanovllm.engine.input_processor import Embeddings, InputProcessor, drawn_seed
from nanovllm.engine.metrics import Metric
from nanovllm.engine.owner import OwnerProcess
from nanovllm.engine.request import EngineInfo, EngineRequest, MediaPrompt
from nanovllm.lora_request import LoRARequest, checked
from nanovllm.media import mm_inputs as media_given
from nanovllm.media.mm_inputs import MMInput
from nanovllm.parallel.channel import MAX_PAYLOAD_BYTES
from nanovllm.parallel.ranks import deferred_interrupts
from nanovllm.pooling_params import PoolingParams
from nanovllm.prompts import AnyPrompt, Prompt, PromptRefused, as_prompt
from nanovllm.replicas import messages
from nanovllm.replicas.dispatcher import Dispatcher, Parcel, Pending
from nanovllm.replicas.handshake import Fleet, raisable
from nanovllm.replicas.messages import Add, Done, RowTokens
from nanovllm.replicas.metric_aggregation import aggregate
from nanovllm.replicas.replica import Event, Replica, ReplicaFailed, Starter
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.outputs import Outbox, OutputDelta

if TYPE_CHECKING:
    from nanovllm.engine.mm_processor import MMProcessor

logger = logging.getLogger(__name__)

# A thread that waits for outputs releases the engine after this time.
WAIT_S = 0.005
MAX_MEDIA_BYTES = MAX_PAYLOAD_BYTES // 2

Ask = Callable[[MediaPrompt], EngineRequest]  # raises ValueError


class _RouterMetrics:
    """The combined metrics of all replicas."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas

    def read(self) -> list[Metric]:
        return aggregate([replica.read_metrics() for replica in self._replicas])


class Router:
    """`data_parallel_size` engines in other processes, with the interface of one (`AnyEngine`).

    Use it from one thread at a time (`LockedEngine`). A request runs on one replica from its
    beginning to its end. A replica that fails is started again; the others go on. Its requests are
    tried again, or end with an error if tokens of them have come (`Dispatcher`). Requests get the
    ids, and so the seeds, that one engine would give them.
    """

    def __init__(self, config: EngineConfig, starter: Starter) -> None:
        """Start all replicas and wait until they are warm. Errors are those of `load`, and
        ReplicaFailed."""
        self.config = config
        self._media: MMProcessor | None = None
        self._outbox = Outbox()
        self._num_added = 0
        self._is_closed = False
        self._owner = OwnerProcess()
        self._fleet = Fleet(starter, config.data_parallel_size)
        self.replicas, self._inbox = self._fleet.replicas, self._fleet.inbox
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        """Start the replicas, and what depends on what they say of themselves."""
        config = self.config
        self._fleet.start()
        self.tokenizer, infos = self._fleet.tokenizer, self._fleet.infos
        max_num_seqs = sum(one.max_num_seqs for one in infos)
        self.info: EngineInfo = replace(infos[0], max_num_seqs=max_num_seqs)
        self.max_model_len, self.max_num_seqs = self.info.max_model_len, max_num_seqs
        self.default_params = SamplingParams(**self.info.default_params)
        self.eos_ids = frozenset(self.info.eos_ids)
        self.metrics = _RouterMetrics(self.replicas)
        self._dispatcher = Dispatcher(self._fleet)
        self._pending = self._dispatcher.pending
        self._intake = InputProcessor.of(config, self.tokenizer, self.info)
        self._preparing: dict[int, Ask] = {}  # requests whose media are prepared
        self._media = self._new_media()

    def _new_media(self) -> MMProcessor | None:
        """None for a model that reads text only."""
        if self.info.media_scale is None:
            return None
        from nanovllm.engine.mm_processor import MediaPrompts, MMProcessor  # imports torch

        options = self.config.media
        made = MediaPrompts.of(self.config, self.tokenizer, self.info.media_scale, options)
        return MMProcessor(made, options)

    def close(self) -> None:
        """End all replicas and everything they started. Does nothing in a fork of the process."""
        self._is_closed = True
        if self._owner.is_here and hasattr(self, "_fleet"):
            if self._media is not None:
                self._media.close()
            self._fleet.close()

    def check_ranks(self) -> None:
        """Does nothing: `advance` finds lost replicas."""

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        """Does nothing: see `check_ranks`."""

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self.close()

    def sleep(self, level: int = 1) -> None:
        """Not supported: raises ValueError."""
        self._refuse("sleep")

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Not supported: raises ValueError."""
        self._refuse("wake_up")

    @property
    def is_sleeping(self) -> bool:
        return False

    def enter_thread(self) -> None:
        """Nothing to do: steps run in other processes."""

    def prompt_ids(self, request_id: int) -> list[int]:
        """The prompt of an unfinished request."""
        return self._pending[request_id].prompt_ids

    def token_ids(self, prompt: Prompt) -> list[int]:
        """See `InputProcessor.text_ids`."""
        return self._intake.text_ids(prompt)

    def encoded(self, prompt: Prompt) -> Prompt:
        """See `InputProcessor.encoded`."""
        return self._intake.encoded(prompt)

    def check_media(self, media: Sequence[MMInput]) -> None:
        """Raises ValueError for images or videos that no prompt of this model can have."""
        if self._media is None:
            media_given.refuse(self.config.model, media)
        else:
            self._media.check_media(media)

    def run_full_steps(self) -> None:
        """Does nothing: replicas run what they have."""

    def forget_prefixes(self) -> None:
        """Invalidate the prefix caches for later requests."""
        with deferred_interrupts():
            self._dispatcher.forget_prefixes()

    def prepare_grammars(self) -> None:
        """Implements `Engine.prepare_grammars`."""
        with deferred_interrupts():
            for replica in self.replicas:
                replica.send(messages.PREPARE_GRAMMARS)

    def add_request(
        self,
        prompt: AnyPrompt | Prompt | MediaPrompt,
        params: SamplingParams | PoolingParams | None = None,
        *,
        incremental: bool = True,
        embeddings: Embeddings = (),
        positions: np.ndarray | None = None,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> int:
        """Queue a prompt on a replica. Returns the request's id. Arguments are those of `Engine`.

        Raises ValueError as `Engine` does, and for more embeddings or patches than a message takes.
        Raises ReplicaFailed if no replica is left.
        """
        self._check_open()
        params = params or SamplingParams()
        given = prompt if isinstance(prompt, MediaPrompt) else as_prompt(prompt)
        media = self._media_for(given, params, embeddings, positions)
        if media is not None:
            params = params.clone()  # it is used once they are prepared
        ask = partial(
            self._intake.request,
            params=params,
            incremental=incremental,
            priority=priority,
            lora_request=lora_request,
        )
        asked = ask(given, embeddings=embeddings, positions=positions)
        if isinstance(params, SamplingParams):
            self._intake.check_forms(params)
        if media is None or isinstance(given, MediaPrompt):
            return self.add(asked)
        with deferred_interrupts():
            request_id = self._new_request(asked)
            self._preparing[request_id] = ask
            media.add(request_id, given)
        return request_id

    def _media_for(
        self,
        prompt: Prompt | MediaPrompt,
        params: SamplingParams | PoolingParams,
        embeddings: Embeddings,
        positions: np.ndarray | None,
    ) -> MMProcessor | None:
        """What prepares the media of a prompt, if it has some. Raises ValueError for those that it
        cannot have."""
        if isinstance(prompt, MediaPrompt) or not prompt.media:
            return None
        self.check_media(prompt.media)
        assert self._media is not None
        self._media.check(prompt, params, embeddings, positions)
        return self._media

    def add(self, asked: EngineRequest) -> int:
        """Queue a request that an `InputProcessor` has checked. Raises the errors of
        `add_request`."""
        self._check_open()
        self._check_size(asked)
        with deferred_interrupts():
            request_id = self._new_request(asked)
            try:
                self._send(request_id, asked)
            except BaseException:
                del self._pending[request_id]
                raise
        return request_id

    def _new_request(self, asked: EngineRequest) -> int:
        """Note a request, and return its id. Raises ReplicaFailed."""
        if self._fleet.is_lost:
            raise ReplicaFailed(self._no_replica)
        request_id = self._num_added
        self._num_added += 1
        row = RowTokens(request_id, [], None if asked.params.logprobs is None else [])
        self._pending[request_id] = Pending(asked.prompt_ids, row)
        return request_id

    def _send(self, request_id: int, asked: EngineRequest) -> None:
        """Send a request to a replica."""
        prompt_ids = asked.prompt_ids
        seed = drawn_seed(self.config.seed, request_id) if asked.seed is None else asked.seed
        media = messages.dump_media(asked)
        fields = messages.packed_params(asked.params, detokenizes=asked.detokenizes)
        message = Add(
            [request_id], [seed], prompt_ids, fields, asked.incremental, asked.priority,
            asked.cache_salt, asked.detokenizes, has_media=bool(media), adapter=asked.adapter,
            pooling=asked.pooling, second_at=asked.second_at,
            prompt_logprobs=asked.params.prompt_logprobs,
        )  # fmt: skip
        cost = len(prompt_ids) + self._intake.max_output(asked.params, len(prompt_ids))
        digests = []
        if self.config.enable_prefix_caching:
            digests = asked.block_digests(self.info.block_size)
        self._dispatcher.send(request_id, Parcel(messages.dump(message), media, digests, cost))

    def add_lora(self, request: LoRARequest) -> bool:
        """Returns True: a replica checks and reads an adapter when a request names it. Raises
        ValueError if adapters are not enabled."""
        return checked(request, is_enabled=self.config.enable_lora) is not None

    def remove_lora(self, lora_int_id: int) -> bool:
        """Returns False: a replica forgets an adapter when another one needs its memory."""
        return False

    def _check_size(self, asked: EngineRequest) -> None:
        if asked.num_bytes > MAX_MEDIA_BYTES:
            raise ValueError(
                f"the prompt's images and embeddings have {asked.num_bytes} bytes: with "
                f"{self.config.replicas_option} at most {MAX_MEDIA_BYTES} are supported"
            )

    def abort(self, request_id: int, reason: str = "abort") -> None:
        """End a request now; its last output follows. Unknown ids are ignored."""
        if pending := self._drop([request_id]).get(request_id):
            self._outbox.outputs.append(self._ended(request_id, pending, reason))

    def abort_all(self, request_ids: Iterable[int]) -> None:
        """End requests and drop their last outputs."""
        dropped = set(request_ids)
        self._drop(dropped)
        self._outbox.take(dropped)

    def advance(self) -> None:
        """Take what the replicas have sent; if there is nothing, wait for some milliseconds.

        Raises ReplicaFailed once no replica is left.
        """
        self._check_open()
        with deferred_interrupts():
            timeout = WAIT_S if self._pending else 0.0
            try:
                self._take(self._inbox.get(timeout=timeout))
                while True:
                    self._take(self._inbox.get_nowait())
            except queue.Empty:
                pass
            if self._preparing:
                self._send_prepared()
            if self._fleet.is_lost:
                raise ReplicaFailed(self._no_replica)
            self._dispatcher.give_out()

    def take(self, request_ids: Container[int] | None = None) -> list[OutputDelta]:
        """Remove and return the waiting outputs of these requests, or of all."""
        return self._outbox.take(request_ids)

    def has_outputs(self, request_ids: Container[int] | None = None) -> bool:
        """Whether outputs of these requests, or of any, are waiting."""
        return self._outbox.has(request_ids)

    def _drop(self, request_ids: Iterable[int]) -> dict[int, Pending]:
        """Forget unfinished requests here and at their replicas; returns them."""
        with deferred_interrupts():
            dropped = self._dispatcher.drop(request_ids)
            for request_id in dropped:
                self._release(request_id)
        return dropped

    def _finish(self, request_id: int) -> Pending:
        self._release(request_id)
        return self._dispatcher.finish(request_id)

    def _release(self, request_id: int) -> None:
        """Forget the media of a request."""
        if self._media is not None:
            self._preparing.pop(request_id, None)
            self._media.drop(request_id)

    def _send_prepared(self) -> None:
        """Send the requests whose media have been prepared."""
        assert self._media is not None
        for request_id, found in self._media.take():
            ask = self._preparing.pop(request_id)
            try:
                if isinstance(found, str):
                    raise PromptRefused(found)
                if isinstance(found, WorkFailed):
                    raise found
                asked = ask(found)
                self._check_size(asked)
                self._pending[request_id].prompt_ids = asked.prompt_ids
                self._send(request_id, asked)
            except ValueError as error:
                traceback = error if isinstance(error, WorkFailed) else None
                logger.error("request %d: %s", request_id, error, exc_info=traceback)
                self._fail(request_id, str(error))

    def _take(self, event: Event) -> None:
        """Turn a message or a failure of a replica into outputs."""
        replica = event.replica
        if replica is not self.replicas[replica.index] or replica.failure is not None:
            return  # it is lost
        if event.failure is not None:
            self._lose(replica, raisable(event.failure))
        elif event.name == messages.READY:
            try:
                self._dispatcher.ready(replica, event.payload)
            except ValueError as error:
                self._lose(replica, error)
        else:
            found = messages.load_outputs(event.payload)
            for request_id, token_id in zip(found.ids, found.tokens):
                self._grow(RowTokens(request_id, [token_id]))
            for row in found.rows:
                self._grow(row)

    def _grow(self, row: RowTokens) -> None:
        """Output the new part of an answer."""
        pending = self._pending.get(row.request_id)
        if pending is None:
            return  # it was aborted in the meantime
        pending.row.extend(row)
        if row.token_ids:
            pending.parcel = None  # it is not tried again
        if row.done is not None:
            self._finish(row.request_id)
            if pending.replica is not None:
                self._fleet.note_answer(pending.replica.index)
        self._outbox.outputs.append(self._increment(row, pending, row.done))

    def _increment(self, row: RowTokens, pending: Pending, done: Done | None) -> OutputDelta:
        """New tokens, and the whole answer if it is `done`."""
        tokenizer = self.tokenizer
        completion = None
        if done is not None:
            completion = messages.completion(done, pending.row, pending.prompt_ids, tokenizer)
        logprobs = messages.logprobs(row.logprobs, tokenizer)
        text = messages.text_of(row)
        return OutputDelta(row.request_id, row.token_ids, text, logprobs, completion)

    def _ended(
        self, request_id: int, pending: Pending, reason: str, error: str | None = None
    ) -> OutputDelta:
        """The last output of a request that its replica did not finish."""
        done = Done(reason, None, 0, None, error)
        row = RowTokens(request_id, [], None if pending.row.logprobs is None else [])
        return self._increment(row, pending, done)

    def _fail(self, request_id: int, error: str) -> None:
        """End a request with an error."""
        pending = self._finish(request_id)
        self._outbox.outputs.append(self._ended(request_id, pending, "error", error))

    def _lose(self, replica: Replica, failure: Exception) -> None:
        for request_id, reason in self._dispatcher.lost(replica, failure).items():
            self._fail(request_id, reason)

    @property
    def _no_replica(self) -> str:
        return f"no replica is left: {self._fleet.causes}"

    def _check_open(self) -> None:
        self._owner.check()
        if self._is_closed:
            raise RuntimeError("this engine is closed: load the model again")

    def _refuse(self, what: str) -> None:
        raise ValueError(f"{what} is not supported with {self.config.replicas_option}")
