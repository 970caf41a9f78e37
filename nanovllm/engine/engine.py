"""The engine turns requests into increments, step by step.

`LLM`, `LLMEngine` and servers use it.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.engine.input_processor import Embeddings, drawn_seed
from nanovllm.engine.parts import EngineParts
from nanovllm.engine.request import EngineRequest, MediaPrompt, root_of
from nanovllm.engine.step_watch import EVERY_STEPS
from nanovllm.lora_request import LoRARequest
from nanovllm.media.mm_inputs import MMInput
from nanovllm.pooling_params import PoolingParams
from nanovllm.prompts import AnyPrompt, Prompt, as_prompt
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.outputs import OutputDelta, TextStream
from nanovllm.schedule.plan import LogitEdits, StepPlan
from nanovllm.schedule.request import Request, Status
from nanovllm.schedule.scheduler import Proposer
from nanovllm.startup.load import load
from nanovllm.structured.library import Source
from nanovllm.structured.matcher import Matcher

PREPARING_WAIT_S = 0.02  # the longest wait of a thread that holds the engine


class Engine(EngineParts):
    """Call `add_request`, then `step` until a request's last output, or `abort`.

    Use an engine from one thread at a time (`LockedEngine`). Two engines share nothing.
    """

    @classmethod
    def from_options(cls, model: str, **options: Any) -> Engine:
        """Load a model and warm up. Options are `EngineConfig` fields; others raise TypeError."""
        return cls(load(EngineConfig.from_options(model, options)))

    def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and cache back until `wake_up`; cached prefixes are dropped.

        Level 1 moves the weights to the host, level 2 drops them. Raises ValueError for another
        level, while requests are unfinished, and without enable_sleep_mode where that is needed.
        """
        self._check_open()
        num_unfinished = len(self._answers.requests)
        if num_unfinished:
            raise ValueError(
                f"{num_unfinished} request(s) are unfinished and would lose their cache: "
                "finish or abort them before sleep()"
            )
        self._runner.platform.synchronize()
        self._sleeper.sleep(level)
        if self.scheduler.adapters is not None:
            self.scheduler.adapters.reset()  # level 2 drops them with the weights
        self.scheduler.cache.evict()

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Undo `sleep` for the parts in `tags` ("weights", "kv_cache"), or for both.

        Dropped weights are read from the checkpoint again. Raises ValueError for other tags.
        """
        self._check_open()
        self._sleeper.wake_up(tags)

    def prompt_ids(self, request_id: int) -> list[int]:
        """The prompt of an unfinished request."""
        return self._answers.requests[request_id][0].prompt_ids

    def token_ids(self, prompt: Prompt) -> list[int]:
        """See `InputProcessor.text_ids`."""
        return self._intake.text_ids(prompt)

    def encoded(self, prompt: Prompt) -> Prompt:
        """See `InputProcessor.encoded`. Needs no lock, unlike `add_request`."""
        return self._intake.encoded(prompt)

    def check_media(self, media: Sequence[MMInput]) -> None:
        """Raises ValueError for images or videos that this model does not support."""
        self._media.check_media(media)

    @property
    def propose(self) -> Proposer | None:
        """A function that proposes the next token ids of a `Request` (speculative decoding).

        A decode step verifies the proposals and keeps those that the model chooses as well, so
        proposals do not change answers. None: each decode step yields one token a row, unless the
        device proposes tokens itself. With a function no step runs ahead: it needs all tokens.
        """
        return self.scheduler.propose

    @propose.setter
    def propose(self, proposer: Proposer | None) -> None:
        if proposer is not None and not self.scheduler.max_proposals:
            raise ValueError("propose needs draft_lengths: without it no step verifies proposals")
        self.scheduler.propose = proposer

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
        """Queue a prompt (see `nanovllm/prompts.py`, or a prepared one); returns the request's id.

        With `incremental` False the request has one output, at its end. `embeddings` are (position,
        [n, D]) pairs: they replace the embeddings of n prompt tokens from this position on, on the
        scale of the checkpoint's table; the ids of these tokens are not read. In [n, K · D] the
        columns after the first D are added to the hidden states after the first layers, D after
        each. `positions` are those of the prompt's tokens in time, height and width, int64 [3, T],
        for models that have three. Requests with a lower `priority` number run first.
        `lora_request` is the adapter, which needs enable_lora.

        Raises ValueError, and queues nothing, if the prompt is empty, too long or has ids outside
        the vocabulary, or if embeddings do not fit the prompt or the model. Media are prepared
        in threads: if one cannot be read, the request ends with an error.
        """
        if isinstance(params, PoolingParams):
            return self.add(self._intake.pooling_request(prompt, params, incremental, priority))
        params = (params or SamplingParams()).clone()
        if isinstance(prompt, MediaPrompt):
            return self.add(
                self._intake.request(
                    prompt,
                    params,
                    incremental=incremental,
                    priority=priority,
                    lora_request=lora_request,
                )
            )
        given = as_prompt(prompt)
        if given.media:
            self._intake.check(params)
            self._media.check(given, params, embeddings, positions)
        asked = self._intake.request(
            given,
            params,
            incremental=incremental,
            embeddings=embeddings,
            positions=positions,
            priority=priority,
            lora_request=lora_request,
        )
        return self.add(asked, given if given.media else None)

    def add(self, asked: EngineRequest, with_media: Prompt | None = None) -> int:
        """Queue a request that `InputProcessor` has checked; returns its id.

        with_media: the prompt, if its media are not prepared yet. Raises ValueError for invalid
            grammars and edits of logits, and for an adapter whose files do not fit the model.
        """
        self._check_open()
        self._sleeper.check_awake()
        adapter = self.adapters.find(asked.adapter)
        waits = adapter is not None and not self.adapters.begin(adapter.request.lora_int_id)
        params, prompt_ids = asked.params, asked.prompt_ids
        edits, source = self._prepared(asked)
        for key, embeds in asked.embeddings.items():
            self._runner.add_embeddings(key, embeds)
        request_id = self._num_added
        self._num_added += 1
        stop_ids = params.stop_ids(self._eos_ids)
        seed = drawn_seed(self.config.seed, request_id) if asked.seed is None else asked.seed
        request = Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            params=params,
            seed=seed,
            max_output=self._intake.max_output(params, len(prompt_ids), asked.positions),
            stop_ids=frozenset(i for i in stop_ids if i < self.model_config.vocab_size),
            incremental=asked.incremental,
            contents=asked.contents,
            prompt_position_3P=asked.positions,
            priority=asked.priority,
            edits=edits,
            cache_root=root_of(asked.cache_root, adapter.digest) if adapter else asked.cache_root,
            adapter_id=adapter.request.lora_int_id if adapter else 0,
            status=Status.PREPARING,
        )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(prompt_ids)
        tokenizer = self.tokenizer if asked.detokenizes else None
        stream = TextStream(tokenizer, params, incremental=asked.incremental)
        self._held.hold(asked.media)
        try:
            self._answers.requests[request_id] = request, stream
            if with_media is not None or source is not None or waits:
                self._preparation.add(request, with_media, source)
            else:
                self._queue(request)
            return request_id
        except BaseException:  # such as Ctrl-C
            self._answers.forget(request)
            self._restart()
            raise

    def _prepared(self, asked: EngineRequest) -> tuple[LogitEdits | None, Source | None]:
        """The edits of logits and the grammar of a request, for which the runner has memory."""
        params, forms = asked.params, asked.forms
        if forms.found is None:
            edits, source = self._intake.forms(params)
            needs_masks = source is not None or params.min_tokens > 0
            self._runner.prepare(edits, has_penalties=params.has_penalties, has_masks=needs_masks)
            forms.found = edits, source  # the memory is kept
        return forms.found

    def _queue(self, request: Request) -> None:
        """Queue a request that is ready, unless an interrupted step has queued it."""
        if request.status is Status.PREPARING:
            request.status = Status.WAITING
            self.scheduler.add(request)
            self.metrics.num_prompt_tokens += len(request.prompt_ids)

    def _queue_prepared(self, wait_s: float) -> None:
        """Queue requests whose media and grammars are ready, and end those whose media cannot be
        read or whose grammars are refused.

        If none is ready, wait up to `wait_s` for one.
        """
        for request, error in self._preparation.ready(wait_s):
            if error is None:
                self._queue(request)
            else:
                self._answers.end(request.request_id, "error", error)

    def add_lora(self, request: LoRARequest) -> bool:
        """Check an adapter and begin to read it, before a request names it. Returns True. Raises
        ValueError as `add` does."""
        self._check_open()
        found = self.adapters.find(request)
        assert found is not None
        self.adapters.begin(found.request.lora_int_id)
        return True

    def remove_lora(self, lora_int_id: int) -> bool:
        """Forget an adapter; False if it is not known. Raises ValueError while requests use it."""
        self._check_open()
        return self.adapters.remove(lora_int_id)

    def prepare_grammars(self) -> None:
        """Begin to prepare structured output in a thread. Call it when no request waits: no other
        thread can run meanwhile.

        Without this call the first constrained request delays all others.
        """
        self._grammars.prepare()

    def run_full_steps(self) -> None:
        """Does nothing: requests wait for each other, so that they share steps."""

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        self.scheduler.cache.evict()

    def abort(self, request_id: int, reason: str = "abort") -> None:
        """End a request now. Unknown ids are ignored.

        The next step returns the request's last output, with this finish_reason: "stop" if the
        caller found a stop string.
        """
        if request_id not in self._answers.requests:
            return
        try:
            self._answers.end(request_id, reason)
        except BaseException:  # such as Ctrl-C
            self._restart()
            raise

    def abort_all(self, request_ids: Iterable[int]) -> None:
        """End requests and drop their last outputs, for a caller that no longer reads them."""
        dropped = set(request_ids)
        for request_id in dropped:
            self.abort(request_id)
        self._answers.outbox.take(dropped)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._answers.requests or self._answers.outbox.outputs)

    def step(self) -> list[OutputDelta]:
        """`advance`, then `take` all outputs. The list can be empty while steps are in flight."""
        self.advance()
        return self.take()

    def take(self, request_ids: Container[int] | None = None) -> list[OutputDelta]:
        """Remove and return the waiting outputs of these requests, or of all requests."""
        return self._answers.outbox.take(request_ids)

    def has_outputs(self, request_ids: Container[int] | None = None) -> bool:
        """Whether outputs of these requests, or of any, wait for `take`."""
        return self._answers.outbox.has(request_ids)

    def advance(self) -> StepPlan | None:
        """Launch the next step, collect the results of an earlier one, and return the launched
        plan.

        An error or Ctrl-C leaves the engine usable: unfinished requests continue from their known
        tokens.
        """
        self._check_open()
        try:
            if self._preparation:
                is_idle = not self._in_flight and not self.scheduler.has_work
                self._queue_prepared(PREPARING_WAIT_S if is_idle else 0.0)
            plan = self.scheduler.schedule(may_preempt=not self._in_flight)
            is_timed = self.metrics.num_steps % EVERY_STEPS == 0
            started = time.perf_counter() if is_timed else 0.0
            if plan is not None:
                if self._draft_times is not None:
                    self._draft_times.launching()
                plan = self._with_masks(plan)
                self._held.encode(plan.embeddings)
                self._in_flight.append(self._runner.launch(plan))
            if plan is None and not self._in_flight and self.scheduler.has_work:
                self._wait_for_threads()
            while len(self._in_flight) > self._num_to_leave(plan):
                launched = self._in_flight.popleft()
                result = launched.wait()
                if self._draft_times is not None:
                    self._draft_times.collected(launched.plan, result)
                if is_timed:
                    self._step_watch.note(time.perf_counter() - started, plan, launched.plan)
                self._answers.collect(launched.plan, result)
            self._after_step(plan)
            return plan
        except BaseException:
            self._restart()
            raise

    def _num_to_leave(self, plan: StepPlan | None) -> int:
        """The steps whose results are not read yet after the launch of `plan`."""
        return 0 if plan is None or self.propose is not None else self.run_ahead

    def _after_step(self, plan: StepPlan | None) -> None:
        self.metrics.num_steps += plan is not None
        if self._stats_log is not None:
            self._stats_log.after_step()
        if self.metrics.experts is not None:
            self.metrics.experts.after_step(
                has_run=plan is not None, is_idle=not self._answers.requests
            )

    def _restart(self) -> None:
        """After an error or Ctrl-C: unfinished requests start again from their known tokens."""
        self._in_flight.clear()
        if self._draft_times is not None:
            self._draft_times.clear()
        self._runner.residents_are_known = False
        self._answers.complete_ends()
        requests = (request for request, _ in self._answers.requests.values())
        self.scheduler.restart(one for one in requests if one.status is not Status.PREPARING)

    def _wait_for_threads(self) -> None:
        """Wait for a worker thread, when no step can run before it is done."""
        if self._grammars.wait_for_mask(PREPARING_WAIT_S):
            return
        assert self._preparation, "there is work, but no step can run"
        self._queue_prepared(PREPARING_WAIT_S)

    def _with_masks(self, plan: StepPlan) -> StepPlan:
        """The plan with the masks of its constrained rows."""
        if not plan.sampling.masked:
            return plan
        matchers, proposed = [], []
        for row in plan.sampling.masked:
            has_proposed = not plan.is_prefill and plan.num_tokens[row] > 1
            proposed.append(plan.proposed(row) if has_proposed else [])
            request, _ = self._answers.requests[plan.request_ids[row]]
            assert isinstance(request.constraint, Matcher)
            matchers.append(request.constraint)
        return replace(plan, allowed_MW=self._grammars.masks(matchers, proposed))

    def _check_open(self) -> None:
        self._owner.check()
        if self._is_closed:
            raise RuntimeError("this engine is closed: load the model again")
