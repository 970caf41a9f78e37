"""Replicas of an engine, which run in other processes, with the interface of one engine."""

from __future__ import annotations

import json
import logging
import queue
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.engine.intake import Embeddings, Intake, checked_priority, drawn_seed
from nanovllm.engine.media_intake import MediaPrompt
from nanovllm.engine.metrics import Metric
from nanovllm.engine.owner import Owner
from nanovllm.media.given import Given
from nanovllm.parallel.channel import MAX_PAYLOAD_BYTES
from nanovllm.parallel.ranks import deferred_interrupts
from nanovllm.prompts import AnyPrompt, Prompt, as_prompt
from nanovllm.replicas import attached, messages
from nanovllm.replicas.attached import Attached
from nanovllm.replicas.messages import Addition
from nanovllm.replicas.placing import Place, choose
from nanovllm.replicas.ready import facts_of, raisable
from nanovllm.replicas.replica import Event, Inbox, Replica, ReplicaFailed, Starter
from nanovllm.replicas.totals import totals
from nanovllm.sampling import SamplingParams
from nanovllm.schedule import edit_limits
from nanovllm.schedule.blocks import chained_digests
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.outputs import Completion, Increment, Outbox
from nanovllm.schedule.request import Content, Request
from nanovllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# A thread that waits for outputs lets others in after this time.
WAIT_S = 0.005
MAX_ATTACHED_BYTES = MAX_PAYLOAD_BYTES // 2


@dataclass
class _Pending:
    """An unfinished request, and what is known of its answer."""

    replica: Replica
    prompt_ids: list[int]
    cost: int
    logprobs: list[dict[int, Logprob]] | None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""

    def add(self, one: Increment) -> None:
        self.token_ids += one.token_ids
        self.text += one.text
        if self.logprobs is not None:
            self.logprobs += one.logprobs or []

    def ended(self, request_id: int, reason: str, error: str | None = None) -> Increment:
        """The last output of a request that its replica does not finish."""
        done = Completion(
            self.text, self.token_ids, reason, None, self.prompt_ids, 0, self.logprobs, None, error
        )
        return Increment(request_id, [], "", None if self.logprobs is None else [], done)


class _Metrics:
    """The metrics of all replicas together."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas

    def read(self) -> list[Metric]:
        return totals([replica.read_metrics() for replica in self._replicas])


class Replicas:
    """`data_parallel_size` engines in other processes, with the interface of one (`AnyEngine`).

    Use it from one thread at a time (`SharedEngine`). A request runs on one replica from its
    beginning to its end. A replica that fails ends its requests with an error; the others go on.
    Requests get the ids, and so the seeds, that one engine would give them.
    """

    def __init__(self, config: EngineConfig, starter: Starter) -> None:
        """Start all replicas and wait until they are warm. Errors are those of `load`, and
        ReplicaFailed."""
        self.config = config
        self.replicas: list[Replica] = []
        self._starter = starter
        self._inbox: Inbox = queue.SimpleQueue()
        self._outbox = Outbox()
        self._pending: dict[int, _Pending] = {}
        self._num_added = 0
        self._is_closed = False
        self._owner = Owner()
        try:
            for index in range(config.data_parallel_size):
                self.replicas.append(starter.start(index, self._inbox))
            self.tokenizer: Tokenizer | None = starter.tokenizer()
            facts = facts_of(self.replicas, self._inbox)
        except BaseException:
            self.close()
            raise
        first = facts[0]
        self.facts = replace(first, max_num_seqs=sum(one.max_num_seqs for one in facts))
        self.max_model_len = first.max_model_len
        self.max_num_seqs = self.facts.max_num_seqs
        self.default_params = SamplingParams(**first.default_params)
        self.eos_ids = frozenset(first.eos_ids)
        self.metrics = _Metrics(self.replicas)
        self._block_size = first.block_size
        self._places = [Place(one.num_blocks) for one in facts]
        self._intake = Intake(
            config.model,
            self.tokenizer,
            first.vocab_size,
            first.hidden_size,
            first.max_model_len,
            num_added=first.num_added,
            has_axes=first.has_axes,
            max_grammar_bytes=config.max_grammar_bytes,
        )
        self._has_towers = first.has_towers

    def close(self) -> None:
        """End all replicas. Nothing of them is left. A fork of the process leaves them alone."""
        self._is_closed = True
        if not self._owner.is_here:
            return
        self._pending.clear()
        for replica in self.replicas:
            replica.begin_close()
        for replica in self.replicas:
            replica.close()
        self._starter.close()

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self.close()

    def sleep(self, level: int = 1) -> None:
        """Raises ValueError."""
        self._refuse("sleep")

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Raises ValueError."""
        self._refuse("wake_up")

    @property
    def is_sleeping(self) -> bool:
        return False

    def enter_thread(self) -> None:
        """Threads need no preparation: steps run in other processes."""

    def prompt_ids(self, request_id: int) -> list[int]:
        """The prompt of an unfinished request."""
        return self._pending[request_id].prompt_ids

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked as `add_request` does. Raises ValueError, also for media."""
        self.check_media(prompt.media)
        return self._intake.prompt_ids(prompt, SamplingParams())

    def encoded(self, prompt: Prompt) -> Prompt:
        """The prompt with token ids, unless it has media."""
        if prompt.token_ids is not None or prompt.media or self.tokenizer is None:
            return prompt
        assert prompt.text is not None
        return replace(prompt, token_ids=self.tokenizer.encode(prompt.text))

    def check_media(self, media: Sequence[Given]) -> None:
        """Raises ValueError for images and videos: only prepared ones cross processes."""
        if media:
            self._refuse(media[0].name)

    def forget_prefixes(self) -> None:
        """Let no later request find cached tokens of earlier ones."""
        with deferred_interrupts():
            for replica, place in zip(self.replicas, self._places):
                replica.tell(messages.FORGET)
                place.forget()

    def prepare_grammars(self) -> None:
        """See `Engine.prepare_grammars`."""
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
        """Queue a prompt at a replica; returns the request's id. Arguments are those of `Engine`.

        Raises ValueError as `Engine` does, for images and videos that are not prepared, and for
        more embeddings or patches than a message takes. Raises ReplicaFailed if no replica is left.
        """
        self._check_open()
        params = params or SamplingParams()
        self._intake.check(params)
        self._intake.source(params)
        beside = Attached(embeddings, positions)
        if isinstance(prompt, MediaPrompt):
            beside = Attached(embeddings, prompt.position_3T, prompt.images)
            prompt = Prompt(None, prompt.token_ids, prompt.cache_salt)
        given = as_prompt(prompt)
        self.check_media(given.media)
        prompt_ids = self._intake.prompt_ids(given, params)
        contents = self._checked_contents(beside, len(prompt_ids))
        priority, edits = checked_priority(priority), self._intake.edits(params)
        if edits is not None:
            edit_limits.check(edits, self._intake.vocab_size)
        request_id = self._num_added
        fields = messages.params_fields(params)
        if params.seed is None:
            fields["seed"] = drawn_seed(self.config.seed, request_id)
        addition = Addition(request_id, prompt_ids, fields, incremental, priority, given.cache_salt)
        cost = len(prompt_ids) + self._intake.max_output(params, len(prompt_ids))
        with deferred_interrupts():
            digests = self._digests(addition, contents, beside.positions)
            payload = attached.dump(messages.dump(addition), beside)
            chosen = self._send(payload, digests, cost)
            self._num_added += 1
            logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
            self._pending[request_id] = _Pending(chosen, prompt_ids, cost, logprobs)
        return request_id

    def abort(self, request_id: int, reason: str = "abort") -> None:
        """End a request now, with a last output. Unknown ids are ignored."""
        if pending := self._drop([request_id], reason).get(request_id):
            self._outbox.outputs.append(pending.ended(request_id, reason))

    def abort_all(self, request_ids: Iterable[int]) -> None:
        """End requests and drop their last outputs, for a caller that no longer listens."""
        dropped = set(request_ids)
        self._drop(dropped)
        self._outbox.take(dropped)

    def advance(self) -> None:
        """Take what the replicas have sent; if there is nothing, wait for some milliseconds."""
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
        """Remove and return the waiting outputs of these requests, or of all requests."""
        return self._outbox.take(request_ids)

    def has_outputs(self, request_ids: Container[int] | None = None) -> bool:
        """Whether outputs of these requests, or of any, wait for `take`."""
        return self._outbox.has(request_ids)

    def _digests(
        self, addition: Addition, contents: tuple[Content, ...], positions: np.ndarray | None
    ) -> list[bytes]:
        """The digests of the prompt's blocks, as the replicas' caches have them."""
        if not self.config.enable_prefix_caching:
            return []
        ids, salt = addition.prompt_ids, addition.cache_salt
        known = Request(
            addition.request_id, ids, SamplingParams(), 0, 1, frozenset(),
            contents=contents, prompt_position_3P=positions,
        )  # fmt: skip
        root = sha256(salt.encode()).digest() if salt else b""
        return chained_digests(ids, self._block_size, root=root, content=known.content)

    def _send(self, payload: bytes, digests: list[bytes], cost: int) -> Replica:
        """Give a request to the replica that suits it best, or to another if that has failed."""
        living = {replica.index for replica in self.replicas if replica.failure is None}
        while living:
            index = choose(self._places, living, digests, cost)
            if self.replicas[index].tell(messages.ADD, payload):
                self._places[index].add(digests, cost)
                return self.replicas[index]
            living.remove(index)
        while any(replica.failure is None for replica in self.replicas):
            self._take(self._inbox.get())  # the failures, which the refused messages announce
        causes = "; ".join(str(replica.failure) for replica in self.replicas)
        raise ReplicaFailed(f"no replica is left: {causes}")

    def _checked_contents(self, beside: Attached, prompt_len: int) -> tuple[Content, ...]:
        """The contents of a request. Raises ValueError."""
        contents = self._intake.contents(beside.embeddings, prompt_len)
        self._intake.check_positions(beside.positions, prompt_len)
        if beside.images and not self._has_towers:
            raise ValueError(f"the prompt has images, but {self.config.model!r} reads text only")
        num_bytes = sum(tensor.nbytes for tensor in beside.tensors.values())
        if num_bytes > MAX_ATTACHED_BYTES:
            raise ValueError(
                f"the prompt's images and embeddings have {num_bytes} bytes: with "
                f"{self.config.replicas_option} at most {MAX_ATTACHED_BYTES} are supported"
            )
        return contents + tuple(content for content, _ in beside.images)

    def _drop(self, request_ids: Collection[int], reason: str = "abort") -> dict[int, _Pending]:
        """Forget unfinished requests here and at their replicas; returns them."""
        with deferred_interrupts():
            dropped = {one: self._finish(one) for one in request_ids if one in self._pending}
            for replica in self.replicas:
                ids = [one for one, pending in dropped.items() if pending.replica is replica]
                if ids:
                    replica.tell(messages.ABORT, json.dumps([ids, reason]).encode())
        return dropped

    def _finish(self, request_id: int) -> _Pending:
        pending = self._pending.pop(request_id)
        self._places[pending.replica.index].load -= pending.cost
        return pending

    def _take(self, event: Event) -> None:
        """Turn a message or a failure of a replica into outputs."""
        if event.failure is not None:
            self._end_requests(event.replica, raisable(event.failure))
            return
        for found in messages.outputs(event.payload):
            request_id = found["request_id"]
            pending = self._pending.get(request_id)
            if pending is None:
                continue  # it has been aborted in the meantime
            one = messages.increment(found, pending.prompt_ids, self.tokenizer)
            pending.add(one)
            if one.finished:
                self._finish(request_id)
            self._outbox.outputs.append(one)

    def _end_requests(self, replica: Replica, failure: Exception) -> None:
        replica.failure = failure
        own = [one for one, pending in self._pending.items() if pending.replica is replica]
        logger.error("%d request(s) end with an error: %s", len(own), failure)
        for request_id in own:
            ended = self._finish(request_id).ended(request_id, "error", str(failure))
            self._outbox.outputs.append(ended)

    def _check_open(self) -> None:
        self._owner.check()
        if self._is_closed:
            raise RuntimeError("this engine is closed: load the model again")

    def _refuse(self, what: str) -> None:
        raise ValueError(f"{what} is not supported with {self.config.replicas_option}")
