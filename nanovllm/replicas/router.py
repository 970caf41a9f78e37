"""A router for replicas of an engine in other processes, with the interface of one engine."""

from __future__ import annotations

import logging
import queue
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.engine.intake import Embeddings, Intake, drawn_seed
from nanovllm.engine.metrics import Metric
from nanovllm.engine.owner import Owner
from nanovllm.engine.request import EngineInfo, EngineRequest, MediaPrompt
from nanovllm.media.given import Given
from nanovllm.parallel.channel import MAX_PAYLOAD_BYTES
from nanovllm.parallel.ranks import deferred_interrupts
from nanovllm.prompts import AnyPrompt, Prompt, as_prompt
from nanovllm.replicas import messages
from nanovllm.replicas.handshake import Fleet, raisable
from nanovllm.replicas.load_balancer import Place, choose
from nanovllm.replicas.messages import Add, Done, End, Row
from nanovllm.replicas.replica import Event, Replica, ReplicaFailed, Starter
from nanovllm.replicas.totals import totals
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.outputs import Increment, Outbox

logger = logging.getLogger(__name__)

# A thread that waits for outputs releases the engine after this time.
WAIT_S = 0.005
MAX_MEDIA_BYTES = MAX_PAYLOAD_BYTES // 2


@dataclass
class _Pending:
    """An unfinished request. row: everything received of the answer."""

    replica: Replica
    prompt_ids: list[int]
    cost: int
    row: Row


class _Metrics:
    """The combined metrics of all replicas."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas

    def read(self) -> list[Metric]:
        return totals([replica.read_metrics() for replica in self._replicas])


class Router:
    """`data_parallel_size` engines in other processes, with the interface of one (`AnyEngine`).

    Use it from one thread at a time (`SharedEngine`). A request stays on one replica. If a replica
    fails, its requests end with an error; the others continue. Requests get the same ids, and thus
    the same seeds, as with one engine.
    """

    def __init__(self, config: EngineConfig, starter: Starter) -> None:
        """Start all replicas and wait until they are warm. Raises the errors of `load`, and
        ReplicaFailed."""
        self.config = config
        self._outbox = Outbox()
        self._pending: dict[int, _Pending] = {}
        self._num_added = 0
        self._is_closed = False
        self._owner = Owner()
        self._fleet = Fleet(starter, config.data_parallel_size)
        self.replicas, self._inbox = self._fleet.replicas, self._fleet.inbox
        self.tokenizer, infos = self._fleet.tokenizer, self._fleet.infos
        max_num_seqs = sum(one.max_num_seqs for one in infos)
        self.info: EngineInfo = replace(infos[0], max_num_seqs=max_num_seqs)
        self.max_model_len, self.max_num_seqs = self.info.max_model_len, max_num_seqs
        self.default_params = SamplingParams(**self.info.default_params)
        self.eos_ids = frozenset(self.info.eos_ids)
        self.metrics = _Metrics(self.replicas)
        self._places = [Place(one.num_blocks) for one in infos]
        self._intake = Intake.of(config, self.tokenizer, self.info)

    def close(self) -> None:
        """End all replicas and everything they started. Does nothing in a fork of the process."""
        self._is_closed = True
        if self._owner.is_here and hasattr(self, "_fleet"):
            self._pending.clear()
            self._fleet.close()

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
        """The token ids of a prompt. Raises ValueError as `add_request` does, also for media."""
        self.check_media(prompt.media)
        return self._intake.prompt_ids(prompt, SamplingParams())

    def encoded(self, prompt: Prompt) -> Prompt:
        """The prompt with token ids, unless it has media."""
        if prompt.token_ids is not None or prompt.media or self.tokenizer is None:
            return prompt
        assert prompt.text is not None
        return replace(prompt, token_ids=self.tokenizer.encode(prompt.text))

    def check_media(self, media: Sequence[Given]) -> None:
        """Raises ValueError for media that are not prepared: only prepared ones cross processes."""
        if media:
            self._refuse(media[0].name)

    def forget_prefixes(self) -> None:
        """Invalidate the prefix caches for later requests."""
        with deferred_interrupts():
            for replica, place in zip(self.replicas, self._places):
                replica.tell(messages.FORGET)
                place.forget()

    def prepare_grammars(self) -> None:
        """Implements `Engine.prepare_grammars`."""
        with deferred_interrupts():
            for replica in self.replicas:
                replica.tell(messages.PREPARE_GRAMMARS)

    def add_request(
        self,
        prompt: AnyPrompt | Prompt | MediaPrompt,
        params: SamplingParams | None = None,
        *,
        incremental: bool = True,
        embeddings: Embeddings = (),
        positions: np.ndarray | None = None,
        priority: int = 0,
    ) -> int:
        """Queue a prompt on a replica. Returns the request's id. Arguments are those of `Engine`.

        Raises ValueError as `Engine` does, for media that are not prepared, and for embeddings or
        patches that exceed a message. Raises ReplicaFailed if no replica is left.
        """
        self._check_open()
        if not isinstance(prompt, MediaPrompt):
            prompt = as_prompt(prompt)
            self.check_media(prompt.media)
        params = params or SamplingParams()
        asked = self._intake.request(
            prompt,
            params,
            incremental=incremental,
            embeddings=embeddings,
            positions=positions,
            priority=priority,
        )
        self._intake.check_forms(params)
        return self.add(asked)

    def add(self, asked: EngineRequest) -> int:
        """Queue a request that an `Intake` has checked. Raises the errors of `add_request`."""
        self._check_open()
        num_bytes = asked.num_bytes
        if num_bytes > MAX_MEDIA_BYTES:
            raise ValueError(
                f"the prompt's images and embeddings have {num_bytes} bytes: with "
                f"{self.config.replicas_option} at most {MAX_MEDIA_BYTES} are supported"
            )
        request_id, prompt_ids = self._num_added, asked.prompt_ids
        seed = drawn_seed(self.config.seed, request_id) if asked.seed is None else asked.seed
        media = messages.dump_media(asked)
        fields = messages.params_fields(asked.params, detokenizes=asked.detokenizes)
        message = Add(
            [request_id], [seed], prompt_ids, fields, asked.incremental, asked.priority,
            asked.cache_salt, asked.detokenizes, has_media=bool(media), adapter=asked.adapter,
        )  # fmt: skip
        cost = len(prompt_ids) + self._intake.max_output(asked.params, len(prompt_ids))
        with deferred_interrupts():
            digests = []
            if self.config.enable_prefix_caching:
                digests = asked.block_digests(self.info.block_size)
            replica = self._send(messages.dump(message), media, digests, cost)
            self._num_added += 1
            row = Row(request_id, [], None if asked.params.logprobs is None else [])
            self._pending[request_id] = _Pending(replica, prompt_ids, cost, row)
        return request_id

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
        """Handle messages from the replicas; if there are none, wait a few milliseconds."""
        self._check_open()
        with deferred_interrupts():
            timeout = WAIT_S if self._pending else 0.0
            try:
                self._take(self._inbox.get(timeout=timeout))
                while True:
                    self._take(self._inbox.get_nowait())
            except queue.Empty:
                pass

    def take(self, request_ids: Container[int] | None = None) -> list[Increment]:
        """Remove and return the waiting outputs of these requests, or of all."""
        return self._outbox.take(request_ids)

    def has_outputs(self, request_ids: Container[int] | None = None) -> bool:
        """Whether outputs of these requests, or of any, are waiting."""
        return self._outbox.has(request_ids)

    def _send(self, payload: bytes, media: bytes, digests: list[bytes], cost: int) -> Replica:
        """Send a request to the best replica, or to another one if that has failed."""
        living = {replica.index for replica in self.replicas if replica.failure is None}
        while living:
            index = choose(self._places, living, digests, cost)
            replica = self.replicas[index]
            if (not media or replica.tell(messages.MEDIA, media)) and replica.tell(
                messages.ADD, payload
            ):
                self._places[index].add(digests, cost)
                return replica
            living.remove(index)
        while any(replica.failure is None for replica in self.replicas):
            self._take(self._inbox.get())  # refused messages announce failure events
        raise ReplicaFailed(f"no replica is left: {self._fleet.causes}")

    def _drop(self, request_ids: Collection[int]) -> dict[int, _Pending]:
        """Remove unfinished requests here and on their replicas. Returns them."""
        with deferred_interrupts():
            dropped = {one: self._finish(one) for one in request_ids if one in self._pending}
            for replica in self.replicas:
                ids = [one for one, pending in dropped.items() if pending.replica is replica]
                if ids:
                    replica.tell(messages.END, messages.dump(End(ids, messages.ABORT)))
        return dropped

    def _finish(self, request_id: int) -> _Pending:
        pending = self._pending.pop(request_id)
        self._places[pending.replica.index].release(pending.cost)
        return pending

    def _take(self, event: Event) -> None:
        """Turn a replica's message or failure into outputs."""
        if event.failure is not None:
            self._end_requests(event.replica, raisable(event.failure))
            return
        found = messages.load_outputs(event.payload)
        for request_id, token_id in zip(found.ids, found.tokens):
            self._grow(Row(request_id, [token_id]))
        for row in found.rows:
            self._grow(row)

    def _grow(self, row: Row) -> None:
        """Output the new part of an answer."""
        pending = self._pending.get(row.request_id)
        if pending is None:
            return  # it was aborted in the meantime
        pending.row.extend(row)
        if row.done is not None:
            self._finish(row.request_id)
        self._outbox.outputs.append(self._increment(row, pending, row.done))

    def _increment(self, row: Row, pending: _Pending, done: Done | None) -> Increment:
        """New tokens, with the whole answer if it is `done`."""
        tokenizer = self.tokenizer
        completion = None
        if done is not None:
            completion = messages.completion(done, pending.row, pending.prompt_ids, tokenizer)
        logprobs = messages.logprobs(row.logprobs, tokenizer)
        text = messages.text_of(row)
        return Increment(row.request_id, row.token_ids, text, logprobs, completion)

    def _ended(
        self, request_id: int, pending: _Pending, reason: str, error: str | None = None
    ) -> Increment:
        """The last output of a request that its replica did not finish."""
        done = Done(reason, None, 0, None, error)
        row = Row(request_id, [], None if pending.row.logprobs is None else [])
        return self._increment(row, pending, done)

    def _end_requests(self, replica: Replica, failure: Exception) -> None:
        replica.failure = failure
        own = [one for one, pending in self._pending.items() if pending.replica is replica]
        logger.error("%d request(s) end with an error: %s", len(own), failure)
        for request_id in own:
            pending = self._finish(request_id)
            self._outbox.outputs.append(self._ended(request_id, pending, "error", str(failure)))

    def _check_open(self) -> None:
        self._owner.check()
        if self._is_closed:
            raise RuntimeError("this engine is closed: load the model again")

    def _refuse(self, what: str) -> None:
        raise ValueError(f"{what} is not supported with {self.config.replicas_option}")
