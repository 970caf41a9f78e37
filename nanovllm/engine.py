"""The engine takes requests and returns increments, step by step.

`LLM`, `LLMEngine` and servers use it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.intake import Embeddings, Intake, checked_priority, drawn_seed
from nanovllm.media.given import Given
from nanovllm.media_intake import MediaIntake, MediaPrompt, MediaPrompts, Scale
from nanovllm.metrics import EngineMetrics, StatsLog
from nanovllm.prompts import AnyPrompt, Prompt, as_prompt
from nanovllm.runner.runner import Encodable, Launched, Runner
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.blocks import BlockPool
from nanovllm.schedule.logprobs import Logprob, of_row
from nanovllm.schedule.outputs import Completion, Increment, Outbox, TextStream
from nanovllm.schedule.plan import NO_TOKEN, StepPlan, StepResult
from nanovllm.schedule.request import Request, Status
from nanovllm.schedule.scheduler import Proposer, Scheduler
from nanovllm.startup.load import Loaded, load
from nanovllm.structured.grammars import Compiler, Grammars, Limits, Refusal
from nanovllm.structured.matcher import Matcher

logger = logging.getLogger(__name__)

PREPARING_WAIT_S = 0.02  # of a thread that uses the engine: others may want it meanwhile


class Engine:
    """Call `add_request`, then `step` until a request's last output, or `abort`.

    Use an engine from one thread at a time (`SharedEngine`). Two engines share nothing.
    """

    @classmethod
    def from_options(cls, model: str, **options: Any) -> Engine:
        """Load a model and warm up. Options are `EngineConfig` fields; others raise TypeError."""
        return cls(load(EngineConfig.from_options(model, options)))

    def __init__(self, loaded: Loaded) -> None:
        config = loaded.config
        self.config, self.tokenizer, self.model_config = config, loaded.tokenizer, loaded.runner.cfg
        self.load_seconds, self.memory = loaded.seconds, loaded.memory
        self._runner, self._eos_ids = loaded.runner, loaded.eos_ids
        self._sleeper = loaded.sleeper
        layout = self._runner.layout
        self.max_model_len = layout.max_model_len
        self.default_params = loaded.default_params
        self._intake = Intake(
            config.model,
            self.tokenizer,
            self.model_config.vocab_size,
            self.model_config.hidden_size,
            self.max_model_len,
            num_added=self.model_config.num_added,
            has_axes=bool(self.model_config.rope_axes),
            max_grammar_bytes=config.max_grammar_bytes,
        )
        self.scheduler = Scheduler(
            BlockPool(
                loaded.num_blocks,
                layout.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            max_num_seqs=layout.max_num_seqs,
            max_num_batched_tokens=layout.prefill_tokens[-1],
            max_decode_rows=layout.decode_rows[-1],
            max_prefill_rows=layout.max_prefill_rows,
            stall=loaded.stall,
            max_proposals=max(layout.verify_tokens, default=1) - 1,
        )
        self.run_ahead = (
            self._runner.platform.traits.run_ahead if config.run_ahead is None else config.run_ahead
        )
        self._in_flight: deque[Launched] = deque()
        self._requests: dict[int, tuple[Request, TextStream]] = {}
        self._outbox = Outbox()
        tower = self._runner.model.tower
        self.media_scale = None if tower is None else Scale.of(tower.config)
        prompts = MediaPrompts(
            config.model, self.tokenizer, self.media_scale, loaded.vision, config.media
        )
        self._media = MediaIntake(prompts, config.media)
        self._grammars = self._new_grammars()
        self._images: dict[str, Encodable] = {}  # of unfinished requests, by the keys of contents
        self.metrics = EngineMetrics(self.scheduler, loaded.expert_stats)
        self._stats_log = (
            None if config.disable_log_stats else StatsLog(self.metrics, self.scheduler)
        )
        self._num_added = 0
        self._is_closed = False

    def _new_grammars(self) -> Grammars:
        limits = Limits(self.config.grammar_timeout_s, self.config.max_cached_grammars)
        if self.tokenizer is None:
            return Grammars(None, limits)
        vocab_size = self.model_config.vocab_size
        eos_ids = [token_id for token_id in self._eos_ids if token_id < vocab_size]
        return Grammars(Compiler(self.tokenizer, vocab_size, eos_ids, limits), limits)

    def close(self) -> None:
        """Free the memory of weights, cache and graphs."""
        self._is_closed = True
        self._in_flight.clear()
        self._requests.clear()
        self._media.close()
        self._grammars.close()
        self._runner.close()
        self._sleeper.close()

    def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and cache back until `wake_up`; cached prefixes are forgotten.

        Level 1 moves the weights to the host, level 2 drops them. Raises ValueError for another
        level, while requests are unfinished, and without enable_sleep_mode where that is needed.
        """
        self._check_open()
        if self.config.tensor_parallel_size > 1:
            size = self.config.tensor_parallel_size
            raise ValueError(
                f"sleep is not supported with tensor_parallel_size={size}, only with 1"
            )
        if self._requests:
            raise ValueError(
                f"{len(self._requests)} request(s) are unfinished and would lose their cache: "
                "finish or abort them before sleep()"
            )
        self._runner.platform.synchronize()
        self._sleeper.sleep(level)
        self.scheduler.pool.forget()

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Undo `sleep` for the parts in `tags` ("weights", "kv_cache"), or for both.

        Dropped weights are read from the checkpoint again. Raises ValueError for other tags.
        """
        self._check_open()
        self._sleeper.wake_up(tags)

    @property
    def is_sleeping(self) -> bool:
        """Whether the weights or the cache are asleep."""
        return bool(self._sleeper.asleep)

    def __del__(self) -> None:
        if hasattr(self, "_runner"):
            self.close()

    @property
    def runner(self) -> Runner:
        return self._runner

    def enter_thread(self) -> None:
        """Prepare the calling thread, which has not used the engine before."""
        self._runner.platform.enter_thread()

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end an answer, unless its parameters say otherwise."""
        return self._eos_ids

    @property
    def max_num_seqs(self) -> int:
        """The most requests that run at the same time."""
        return self.scheduler.max_num_seqs

    def prompt_ids(self, request_id: int) -> list[int]:
        """The prompt of an unfinished request."""
        return self._requests[request_id][0].prompt_ids

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked as `add_request` does. Raises ValueError, also for media."""
        if prompt.media:
            raise ValueError(f"the prompt has {prompt.media[0].name}: only text is supported here")
        return self._intake.prompt_ids(prompt, SamplingParams())

    def encoded(self, prompt: Prompt) -> Prompt:
        """The prompt with token ids, unless it has media. Needs no lock, unlike `add_request`."""
        if prompt.token_ids is not None or prompt.media or self.tokenizer is None:
            return prompt
        assert prompt.text is not None
        return replace(prompt, token_ids=self.tokenizer.encode(prompt.text))

    def check_media(self, media: Sequence[Given]) -> None:
        """Raises ValueError for images or videos that no prompt of this model can have."""
        self._media.check_media(media)

    @property
    def propose(self) -> Proposer | None:
        """A function from a `Request` to token ids that are likely to follow its known tokens.

        A decode step verifies the proposals and keeps those that the model chooses as well, so
        proposals do not change answers. None: each decode step yields one token a row.
        """
        return self.scheduler.propose

    @propose.setter
    def propose(self, proposer: Proposer | None) -> None:
        if proposer is not None and not self.scheduler.max_proposals:
            raise ValueError("propose needs draft_lengths: without them no step verifies proposals")
        self.scheduler.propose = proposer

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
        """Queue a prompt (see `nanovllm/prompts.py`, or a prepared one); returns the request's id.

        With `incremental` False the request has one output, at its end. `embeddings` are (position,
        [n, D]) pairs: they replace the embeddings of n prompt tokens from this position on, as the
        checkpoint's table has them; the ids of these tokens are not read. In [n, K · D] the columns
        behind the first D are added to the hidden states after the first layers, D after each.
        `positions` are those of the prompt's tokens in time, height and width, int64 [3, T], for
        models that have three. Requests with a lower `priority` number run first.

        Raises ValueError, and queues nothing, if the prompt is empty, too long or has ids outside
        the vocabulary, or if embeddings do not fit the prompt or the model. Media are prepared
        in threads: if one cannot be read, the request ends with an error.
        """
        self._check_open()
        self._sleeper.check_awake()
        params = (params or SamplingParams()).clone()
        self._intake.check(params)
        prepared = prompt if isinstance(prompt, MediaPrompt) else None
        if prepared is None:
            given = as_prompt(prompt)
        else:
            given = Prompt(None, prepared.token_ids, prepared.cache_salt)
        if given.media:
            self._check_media(given, params, embeddings, positions)
        prompt_ids = self._intake.prompt_ids(given, params)
        contents = self._intake.contents(embeddings, len(prompt_ids))
        self._intake.check_positions(positions, len(prompt_ids))
        priority, edits = checked_priority(priority), self._intake.edits(params)
        source = self._intake.source(params)
        has_masks = source is not None
        self._runner.prepare(edits, has_penalties=params.has_penalties, has_masks=has_masks)
        for content, (_, embeds) in zip(contents, embeddings):
            self._runner.add_embeddings(content.key, embeds)
        request_id = self._num_added
        self._num_added += 1
        eos_ids = () if params.ignore_eos else self._eos_ids
        stop_ids = {*(params.stop_token_ids or ()), *eos_ids}
        seed = drawn_seed(self.config.seed, request_id) if params.seed is None else params.seed
        request = Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            params=params,
            seed=seed,
            max_output=self._intake.max_output(params, len(prompt_ids)),
            stop_ids=frozenset(i for i in stop_ids if i < self.model_config.vocab_size),
            incremental=incremental,
            contents=contents,
            prompt_position_3P=positions,
            priority=priority,
            edits=edits,
            cache_root=sha256(given.cache_salt.encode()).digest() if given.cache_salt else b"",
        )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(prompt_ids)
        stream = TextStream(self.tokenizer, params, incremental=incremental)
        if prepared is not None:
            self._expand(request, prepared)
        self._requests[request_id] = (request, stream)
        if given.media:
            self._media.add(request_id, given)
        if source is not None:
            self._grammars.add(request_id, source, params)
        self._queue_unless_preparing(request)
        return request_id

    def _check_media(
        self,
        prompt: Prompt,
        params: SamplingParams,
        embeddings: Embeddings,
        positions: np.ndarray | None,
    ) -> None:
        """Refuse a prompt with media that nothing can come of, or with options they exclude."""
        if embeddings or positions is not None:
            raise ValueError(
                f"the prompt has {prompt.media[0].name}: embeddings and positions follow from it, "
                "so none can be given"
            )
        self._media.check(prompt, params)

    def _queue_unless_preparing(self, request: Request) -> None:
        if self._is_preparing(request):
            request.status = Status.PREPARING
            return
        request.status = Status.WAITING
        self.scheduler.add(request)
        self.metrics.num_prompt_tokens += len(request.prompt_ids)

    def _is_preparing(self, request: Request) -> bool:
        return request.request_id in self._media or request.request_id in self._grammars

    def _queue_prepared(self) -> None:
        """Queue requests whose media and grammars are ready, and end those whose media cannot be
        read or whose grammars are refused.

        If there is nothing else to do, wait for one.
        """
        is_idle = not self._in_flight and not self.scheduler.has_work
        wait_s = PREPARING_WAIT_S if is_idle else 0.0
        with self.metrics.waiting_for_media(is_idle and bool(self._media)):
            for request_id, prompt in self._media.take(wait_s if self._media else 0.0):
                self._prepared(request_id, prompt)
        for request_id, matcher in self._grammars.take(0.0 if self._media else wait_s):
            self._prepared(request_id, matcher)

    def _prepared(self, request_id: int, found: MediaPrompt | Matcher | Refusal | str) -> None:
        request, stream = self._requests[request_id]
        if isinstance(found, Refusal):
            # without the reason: it may quote what the user has sent
            logger.error("request %d: structured_outputs.%s is refused", request_id, found.form)
            self._outbox.outputs.append(self._end(request, stream, "error", [], found.text))
            return
        try:
            if isinstance(found, str):
                raise ValueError(found)
            if isinstance(found, Matcher):
                request.constraint = found
            else:
                self._expand(request, found)
        except ValueError as error:
            logger.error("request %d: %s", request_id, error)
            self._outbox.outputs.append(self._end(request, stream, "error", [], str(error)))
        else:
            self._queue_unless_preparing(request)

    def _expand(self, request: Request, found: MediaPrompt) -> None:
        """Give a request its whole prompt. Raises ValueError if this is too long."""
        prompt = Prompt(None, found.token_ids)
        prompt_ids = self._intake.prompt_ids(prompt, request.params)
        self._intake.check_positions(found.position_3T, len(prompt_ids))
        request.max_output = self._intake.max_output(request.params, len(prompt_ids))
        self._images.update((content.key, image) for content, image in found.images)
        contents = tuple(content for content, _ in found.images)
        request.expand(prompt_ids, contents, found.position_3T)

    def forget_prefixes(self) -> None:
        """Let no later request find cached tokens of earlier ones."""
        self.scheduler.pool.forget()

    def abort(self, request_id: int, reason: str = "abort") -> None:
        """End a request now. Unknown ids are ignored.

        The next step returns the request's last output, with this finish_reason: "stop" if the
        caller has found a stop string.
        """
        if request_id in self._requests:
            self._outbox.outputs.append(self._end(*self._requests[request_id], reason, []))

    def abort_all(self, request_ids: Iterable[int]) -> None:
        """End requests and drop their last outputs, for a caller that no longer listens."""
        dropped = set(request_ids)
        for request_id in dropped:
            self.abort(request_id)
        self._outbox.take(dropped)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests or self._outbox.outputs)

    def step(self) -> list[Increment]:
        """`advance`, then `take` all outputs. The list can be empty while steps are in flight."""
        self.advance()
        return self.take()

    def take(self, request_ids: Container[int] | None = None) -> list[Increment]:
        """Remove and return the waiting outputs of these requests, or of all requests."""
        return self._outbox.take(request_ids)

    def has_outputs(self, request_ids: Container[int] | None = None) -> bool:
        """Whether outputs of these requests, or of any, wait for `take`."""
        return self._outbox.has(request_ids)

    def advance(self) -> StepPlan | None:
        """Launch the next step, whose plan is returned, and collect the results of an earlier one.

        An error or Ctrl-C leaves the engine usable: unfinished requests continue from their known
        tokens.
        """
        self._check_open()
        try:
            if self._media or self._grammars:
                self._queue_prepared()
            plan = self.scheduler.schedule(may_preempt=not self._in_flight)
            if plan is not None:
                plan = self._with_masks(plan)
                self._encode(plan)
                self._in_flight.append(self._runner.launch(plan))
            if self._in_flight and (plan is None or len(self._in_flight) > self.run_ahead):
                launched = self._in_flight.popleft()
                self._collect(launched.plan, launched.wait())
            elif plan is None and self.scheduler.has_work and not self._waited_for_mask():
                raise AssertionError("there is work, but no step can run")
            self.metrics.num_steps += plan is not None
            if self._stats_log is not None:
                self._stats_log.after_step()
            if self.metrics.experts is not None:
                self.metrics.experts.after_step(
                    has_run=plan is not None, is_idle=not self._requests
                )
            return plan
        except BaseException:
            self._in_flight.clear()
            self._runner.residents_are_known = False
            requests = (request for request, _ in self._requests.values())
            self.scheduler.restart(one for one in requests if not self._is_preparing(one))
            raise

    def _waited_for_mask(self) -> bool:
        return self._grammars.wait_for_mask(PREPARING_WAIT_S)

    def _with_masks(self, plan: StepPlan) -> StepPlan:
        """The plan with the masks of its constrained rows."""
        if not plan.choice.masked:
            return plan
        matchers = []
        for row in plan.choice.masked:
            request, _ = self._requests[plan.request_ids[row]]
            assert isinstance(request.constraint, Matcher)
            matchers.append(request.constraint)
        return replace(plan, allowed_MW=self._grammars.masks(matchers))

    def _encode(self, plan: StepPlan) -> None:
        """Encode the images that a plan needs and that have no embeddings yet."""
        keys = dict.fromkeys(one.key for one in plan.embeddings)
        missing = [key for key in keys if key not in self._runner.embeddings]
        if missing:
            self._runner.encode({key: self._images[key] for key in missing})

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this engine is closed: load the model again")

    def _collect(self, plan: StepPlan, result: StepResult) -> None:
        """Give a step's tokens to their requests. Tokens after a stop or an abort are dropped.

        A request for which no token could be chosen ends with an error; the others go on.
        """
        for wanted, values in zip(plan.prompt_logprobs, result.prompt_logprobs):
            if wanted.request_id in self._requests:
                request, _ = self._requests[wanted.request_id]
                for offset, token_id in enumerate(wanted.token_ids):
                    found = of_row(token_id, values, offset, wanted.num_top, self.tokenizer)
                    request.prompt_logprobs[wanted.first + offset] = found
        for row, request_id in enumerate(plan.request_ids):
            token_ids = result.tokens[row]
            if not token_ids or request_id not in self._requests:
                continue
            request, stream = self._requests[request_id]
            num_top = request.params.logprobs
            if num_top is not None and result.logprobs is not None and token_ids[0] != NO_TOKEN:
                found = of_row(token_ids[0], result.logprobs, row, num_top, self.tokenizer)
                request.logprobs.append(found)
            num_fed = 1 if plan.is_prefill else plan.num_tokens[row]
            self._outbox.outputs += self._grown(request, stream, num_fed, token_ids)

    def _grown(
        self, request: Request, stream: TextStream, num_fed: int, token_ids: list[int]
    ) -> list[Increment]:
        """The outputs for the new tokens of a step that fed `num_fed` tokens of a request."""
        if request.is_failing:
            self.scheduler.tokens_known(request, num_fed, [])
            self.scheduler.retry(request)
            return []
        has_all = token_ids[-1] != NO_TOKEN
        known = token_ids if has_all else token_ids[:-1]
        self.scheduler.tokens_known(request, num_fed, known)
        output = self._output(request, stream, known) if known else None
        outputs = [] if output is None else [output]
        if has_all or request.request_id not in self._requests:
            return outputs
        # The NaN may come from other tokens than its own: attention multiplies the values of later
        # tokens by 0, and 0 · NaN is NaN. So wrong proposals reach the tokens before them, and
        # shared blocks may hold NaN from the request that computed them.
        is_shared = request.num_shared or num_fed > len(token_ids)
        has_error = request.constraint is not None and request.constraint.error is not None
        if not request.is_alone and is_shared and not has_error:
            self.scheduler.retry(request)
            return outputs
        return [*outputs, self._failed(request, stream)]

    def _failed(self, request: Request, stream: TextStream) -> Increment:
        """End a request for which no token could be chosen.

        Later requests do not share its blocks: they may hold NaN.
        """
        error = request.without_token
        logger.error("request %d: %s", request.request_id, error)
        self.scheduler.pool.forget(request.blocks)
        return self._end(request, stream, "error", [], error)

    def _output(
        self, request: Request, stream: TextStream, token_ids: list[int]
    ) -> Increment | None:
        """The output for a request's new `token_ids`, cut after the token that ends the request."""
        num_before = len(request.output_ids) - len(token_ids)
        for num, token_id in enumerate(token_ids, start=1):
            num_outputs = num_before + num
            may_stop = num_outputs >= request.params.min_tokens
            hit_stop_string = stream.grows and stream.push([token_id], may_stop=may_stop)
            stops = hit_stop_string or (may_stop and token_id in request.stop_ids)
            if request.constraint is not None and not stops:
                request.constraint.push(token_id)
                stops = request.constraint.is_ended
            if stops or num_outputs >= request.max_output:
                del request.output_ids[num_outputs:]
                reason = "stop" if stops else "length"
                return self._end(request, stream, reason, token_ids[:num])
        if not stream.incremental:
            return None
        logprobs = _newest_logprobs(request, len(token_ids))
        return Increment(request.request_id, token_ids, stream.take(last=False), logprobs)

    def _end(
        self,
        request: Request,
        stream: TextStream,
        reason: str,
        token_ids: list[int],
        error: str | None = None,
    ) -> Increment:
        self.scheduler.finish(request, reason)
        if stream.stop_string is None:
            may_stop = len(request.output_ids) >= request.params.min_tokens
            stream.finish(request.output_ids, may_stop=may_stop)
        del self._requests[request.request_id]
        self._media.drop(request.request_id)
        self._grammars.drop(request.request_id)
        if request.contents:
            in_use = {one.key for other, _ in self._requests.values() for one in other.contents}
            ended = {one.key for one in request.contents} - in_use
            self._runner.drop_embeddings(ended)
            for key in ended:
                self._images.pop(key, None)
        self.metrics.finished(request, reason)
        stop_reason = stream.stop_string or _stop_token(request, reason)
        completion = Completion.of(request, stream.text, reason, stop_reason, error)
        logprobs = _newest_logprobs(request, len(token_ids))
        piece = stream.take(last=True)
        return Increment(request.request_id, token_ids, piece, logprobs, completion)


def _newest_logprobs(request: Request, num: int) -> list[dict[int, Logprob]] | None:
    if request.params.logprobs is None:
        return None
    return request.logprobs[-num:] if num else []


def _stop_token(request: Request, reason: str) -> int | None:
    """The token of `stop_token_ids` that ended the request."""
    if reason != "stop" or not request.output_ids:
        return None
    newest = request.output_ids[-1]
    return newest if newest in (request.params.stop_token_ids or ()) else None
