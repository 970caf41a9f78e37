"""The engine of a model that pools: requests wait in a queue, and steps take whole prompts.

It has the interface of `engine.engine.Engine`, so `LLM`, replicas and servers use it in its place.
"""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from nanovllm.checks import WorkFailed
from nanovllm.engine.input_processor import Embeddings, InputProcessor
from nanovllm.engine.mm_processor import MediaPrompts, MMProcessor, Scale
from nanovllm.engine.mm_store import MMStore
from nanovllm.engine.owner import OwnerProcess
from nanovllm.engine.request import EngineInfo, EngineRequest, MediaPrompt
from nanovllm.lora_request import LoRARequest
from nanovllm.media.mm_inputs import MMInput
from nanovllm.platforms.base import HostCopy
from nanovllm.pooling.metrics import PoolingMetrics
from nanovllm.pooling.results import result
from nanovllm.pooling_params import PoolingParams
from nanovllm.prompts import AnyPrompt, Prompt, PromptRefused, as_prompt
from nanovllm.runner.pool_inputs import PoolSequence
from nanovllm.runner.pool_runner import PoolRunner
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.outputs import FinishedOutput, Outbox, OutputDelta
from nanovllm.schedule.plan import EmbeddingSpan
from nanovllm.startup.pooling_load import LoadedPooling

logger = logging.getLogger(__name__)

LOOKAHEAD = 64  # requests that a step may leave for the next one
PREPARING_WAIT_S = 0.02  # the longest wait of a thread that holds the engine


class InFlight(NamedTuple):
    """A launched step: its requests, in the order of the rows of its results."""

    request_ids: list[int]
    results_RO: HostCopy


class PoolingEngine:
    """Call `add_request`, then `step` until a request's output, or `abort`.

    Use an engine from one thread at a time (`LockedEngine`).
    """

    def __init__(self, loaded: LoadedPooling) -> None:
        self.config, self.tokenizer = loaded.config, loaded.tokenizer
        self.max_model_len, self.pooling = loaded.max_model_len, loaded.info
        self.load_seconds = loaded.seconds
        self.default_params = SamplingParams()
        self._runner: PoolRunner = loaded.runner
        self.model_config = loaded.runner.model.config
        run_ahead = loaded.config.tuned.run_ahead
        platform = loaded.runner.platform
        self.run_ahead = platform.traits.run_ahead if run_ahead is None else run_ahead
        tower, uses_mrope = loaded.runner.model.tower, bool(self.model_config.rope_axes)
        self.media_scale = None if tower is None else Scale.of(tower.config, uses_mrope=uses_mrope)
        self._intake = InputProcessor.of(loaded.config, self.tokenizer, self.info)
        prompts = MediaPrompts(
            loaded.config.model, self.tokenizer, self.media_scale, loaded.vision,
            loaded.config.media,
        )  # fmt: skip
        self._media = MMProcessor(prompts, loaded.config.media)
        self._held = MMStore(self._runner)
        self._requests: dict[int, EngineRequest] = {}  # unfinished
        self._queue: list[tuple[int, int]] = []  # a heap of (priority, id)
        self._in_flight: deque[InFlight] = deque()
        self._outbox = Outbox()
        self.metrics = PoolingMetrics()
        self._num_added = 0
        self._is_closed = False
        self._owner = OwnerProcess()

    # facts ------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """The facts that clients need, except the digest of the checkpoint."""
        layout, cfg = self._runner.layout, self.model_config
        return EngineInfo(
            "", self.max_model_len, self.max_num_seqs, cfg.vocab_size, cfg.hidden_size,
            layout.block_size, layout.prefill_tokens[-1] // layout.block_size, [], {},
            num_deepstack=cfg.num_deepstack, uses_mrope=bool(cfg.rope_axes),
            has_towers=bool(self._runner.towers.by_name), media_scale=self.media_scale,
            pooling=self.pooling,
        )  # fmt: skip

    @property
    def runner(self) -> PoolRunner:
        return self._runner

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset()

    @property
    def max_num_seqs(self) -> int:
        """The most prompts of one step."""
        return self._runner.layout.max_num_seqs

    @property
    def is_sleeping(self) -> bool:
        return False

    def prompt_ids(self, request_id: int) -> list[int]:
        """The prompt of an unfinished request."""
        return self._requests[request_id].prompt_ids

    def token_ids(self, prompt: Prompt) -> list[int]:
        """See `InputProcessor.text_ids`."""
        return self._intake.text_ids(prompt)

    def encoded(self, prompt: Prompt) -> Prompt:
        """See `InputProcessor.encoded`."""
        return self._intake.encoded(prompt)

    def check_media(self, media: Sequence[MMInput]) -> None:
        """Raises ValueError for images or videos that this model does not support."""
        self._media.check_media(media)

    # requests ---------------------------------------------------------------------------------

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
        """Queue a prompt; returns the request's id. Raises ValueError, and queues nothing, for a
        prompt that does not fit. Media are prepared in threads: if one cannot be read, the request
        ends with an error."""
        given = prompt if isinstance(prompt, MediaPrompt) else as_prompt(prompt)
        params = PoolingParams() if params is None else params
        with_media = given if isinstance(given, Prompt) and given.media else None
        if with_media is not None:
            self._media.check(with_media, params, embeddings, positions)
        asked = self._intake.request(
            given,
            params,
            incremental=incremental,
            embeddings=embeddings,
            positions=positions,
            priority=priority,
            lora_request=lora_request,
        )
        return self.add(asked, with_media)

    def add(self, asked: EngineRequest, with_media: Prompt | None = None) -> int:
        """Queue a request that `InputProcessor` has checked; returns its id. with_media: the
        prompt, if its media are not prepared yet."""
        self._check_open()
        assert asked.pooling is not None
        request_id = self._num_added
        self._num_added += 1
        self._requests[request_id] = asked
        if with_media is None:
            self._enqueue(request_id, asked)
        else:
            self._media.add(request_id, with_media)
        return request_id

    def _enqueue(self, request_id: int, asked: EngineRequest) -> None:
        self._held.hold(asked.media)
        heapq.heappush(self._queue, (asked.priority, request_id))

    def _queue_prepared(self, wait_s: float) -> None:
        """Queue requests whose media are ready, and end those whose media cannot be read.

        If none is ready, wait up to `wait_s` for one.
        """
        for request_id, found in self._media.take(wait_s):
            asked = self._requests[request_id]
            assert asked.pooling is not None
            try:
                if isinstance(found, str):
                    raise PromptRefused(found)
                if isinstance(found, WorkFailed):
                    raise found
                whole = self._intake.pooling_request(
                    found, asked.pooling, asked.incremental, asked.priority
                )
            except ValueError as error:
                traceback = error if isinstance(error, WorkFailed) else None
                logger.error("request %d: %s", request_id, error, exc_info=traceback)
                self._end(request_id, self._requests.pop(request_id), "error", error=str(error))
                continue
            self._requests[request_id] = whole
            self._enqueue(request_id, whole)

    def abort(self, request_id: int, reason: str = "abort") -> None:
        """End a request now; its last output follows. Unknown ids are ignored."""
        asked = self._requests.pop(request_id, None)
        if asked is not None:
            self._end(request_id, asked, reason)

    def abort_all(self, request_ids: Iterable[int]) -> None:
        """End requests and drop their outputs, for a caller that no longer reads them."""
        dropped = set(request_ids)
        for request_id in dropped:
            self.abort(request_id)
        self._outbox.take(dropped)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests or self._outbox.outputs)

    # steps ------------------------------------------------------------------------------------

    def step(self) -> list[OutputDelta]:
        """`advance`, then `take` all outputs. The list can be empty while steps are in flight."""
        self.advance()
        return self.take()

    def take(self, request_ids: Container[int] | None = None) -> list[OutputDelta]:
        """Remove and return the waiting outputs of these requests, or of all."""
        return self._outbox.take(request_ids)

    def has_outputs(self, request_ids: Container[int] | None = None) -> bool:
        """Whether outputs of these requests, or of any, wait for `take`."""
        return self._outbox.has(request_ids)

    def advance(self) -> None:
        """Launch the next step, and collect the results of an earlier one.

        An error or Ctrl-C leaves the engine usable: unfinished requests wait again.
        """
        self._check_open()
        try:
            if self._media:
                is_idle = not self._in_flight and not self._queue
                self._queue_prepared(PREPARING_WAIT_S if is_idle else 0.0)
            num_to_leave = self.run_ahead if self._launch() else 0
            while len(self._in_flight) > num_to_leave:
                self._collect(self._in_flight.popleft())
        except BaseException:
            self._restart()
            raise
        self.metrics.num_waiting = len(self._queue) + len(self._media)
        self.metrics.num_running = sum(len(one.request_ids) for one in self._in_flight)

    def run_full_steps(self) -> None:
        """Advance while the waiting requests fill a step. A caller that adds many requests, some at
        a time, calls it between: the device then computes while the next ones are encoded."""
        while self._fills_step():
            self.advance()

    def _fills_step(self) -> bool:
        size = self._runner.layout.prefill_tokens[-1]
        for num, (_, request_id) in enumerate(self._queue, start=1):
            asked = self._requests.get(request_id)
            size -= 0 if asked is None else len(asked.prompt_ids)
            if size <= 0 or num >= self.max_num_seqs:
                return True
        return False

    def _launch(self) -> bool:
        """Launch the next step, if any request waits."""
        chosen = self._next()
        if chosen:
            sequences = [_sequence(one) for _, one in chosen]
            self._held.encode(span for one in sequences for span in one.given)
            launched = self._runner.launch(sequences)
            self._in_flight.append(InFlight([one for one, _ in chosen], launched))
            self.metrics.num_steps += 1
        return bool(chosen)

    def _next(self) -> list[tuple[int, EngineRequest]]:
        """The requests of the next step: the first ones, in their order. Where the next does not
        fit, later ones may, up to LOOKAHEAD: padding costs as much as their tokens."""
        max_rows, room = self.max_num_seqs, self._runner.layout.prefill_tokens[-1]
        chosen: list[tuple[int, EngineRequest]] = []
        skipped: list[tuple[int, int]] = []
        while self._queue and room and len(chosen) < max_rows and len(skipped) < LOOKAHEAD:
            entry = heapq.heappop(self._queue)
            asked = self._requests.get(entry[1])
            if asked is None:
                continue  # it was aborted
            if len(asked.prompt_ids) > room:
                skipped.append(entry)
                continue
            room -= len(asked.prompt_ids)
            chosen.append((entry[1], asked))
        for entry in skipped:
            heapq.heappush(self._queue, entry)
        return chosen

    def _collect(self, step: InFlight) -> None:
        results_RO = step.results_RO.numpy()
        for request_id, raw_O in zip(step.request_ids, results_RO):
            asked = self._requests.pop(request_id, None)
            if asked is None:
                continue  # it was aborted
            assert asked.pooling is not None
            self.metrics.num_prompt_tokens += len(asked.prompt_ids)
            if np.isfinite(raw_O).all():
                found = result(self.pooling, asked.pooling, raw_O)
                self._end(request_id, asked, "stop", found)
            else:
                words = "the model computed infinite numbers or NaN: its weights may be damaged"
                self._end(request_id, asked, "error", error=words)

    def _end(
        self,
        request_id: int,
        asked: EngineRequest,
        reason: str,
        pooled: np.ndarray | None = None,
        error: str | None = None,
    ) -> None:
        self.metrics.num_finished[reason] += 1
        self._media.drop(request_id)
        self._held.release(asked, self._requests.values())
        done = FinishedOutput(
            "", [], reason, None, asked.prompt_ids, 0, None, None, error, pooled=pooled
        )
        self._outbox.outputs.append(OutputDelta(request_id, [], "", None, done))

    def _restart(self) -> None:
        """After an error or Ctrl-C: all unfinished requests wait for a step."""
        self._in_flight.clear()
        self._queue = [
            (one.priority, request_id)
            for request_id, one in self._requests.items()
            if request_id not in self._media
        ]
        heapq.heapify(self._queue)

    # the engine -------------------------------------------------------------------------------

    def check_ranks(self) -> None:
        """Raise the failure of the ranks, if they have failed."""
        self._runner.check_ranks()

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        """See `WorkerGroup.call_on_failure`."""
        self._runner.call_on_failure(callback)

    def close(self) -> None:
        """Free the memory of weights and graphs. Does nothing in a fork of the process."""
        if self._is_closed or not self._owner.is_here:
            return
        self._is_closed = True
        self._in_flight.clear()
        self._requests.clear()
        self._media.close()
        self._runner.close()

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self.close()

    def enter_thread(self) -> None:
        """Prepare the calling thread before it first uses the engine."""
        self._runner.platform.enter_thread()

    def forget_prefixes(self) -> None:
        """Does nothing: no prefixes are kept."""

    def prepare_grammars(self) -> None:
        """Does nothing: no text is generated."""

    def sleep(self, level: int = 1) -> NoReturn:
        self._refuse("sleep")

    def wake_up(self, tags: Iterable[str] | None = None) -> NoReturn:
        self._refuse("wake_up")

    def add_lora(self, request: LoRARequest) -> NoReturn:
        self._refuse("an adapter")

    def remove_lora(self, lora_int_id: int) -> NoReturn:
        self._refuse("an adapter")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{what} is not supported with task={self.config.task!r}")

    def _check_open(self) -> None:
        self._owner.check()
        if self._is_closed:
            raise RuntimeError("this engine is closed: load the model again")


def _sequence(asked: EngineRequest) -> PoolSequence:
    given = [EmbeddingSpan(one.key, 0, one.start, one.num) for one in asked.contents]
    return PoolSequence(asked.prompt_ids, asked.second_at, given, asked.positions)
