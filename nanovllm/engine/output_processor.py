"""Adds the tokens of steps to answers, and ends answers: at a stop, a limit, or an error."""

from __future__ import annotations

import logging
from itertools import accumulate

from nanovllm.engine.metrics import EngineMetrics
from nanovllm.engine.mm_store import MMStore
from nanovllm.engine.preparation import Preparation
from nanovllm.schedule.logprobs import Logprob, of_row
from nanovllm.schedule.outputs import FinishedOutput, Outbox, OutputDelta, TextStream
from nanovllm.schedule.plan import NO_TOKEN, StepPlan, StepResult
from nanovllm.schedule.request import Request
from nanovllm.schedule.scheduler import Scheduler
from nanovllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class OutputProcessor:
    """The unfinished requests of an engine, with the texts of their answers.

    requests: by their ids. outbox: outputs not taken yet.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        scheduler: Scheduler,
        preparation: Preparation,
        held: MMStore,
        metrics: EngineMetrics,
    ) -> None:
        self._tokenizer, self._scheduler, self._metrics = tokenizer, scheduler, metrics
        self._preparation, self._held = preparation, held
        self.requests: dict[int, tuple[Request, TextStream]] = {}
        self.outbox = Outbox()

    def collect(self, plan: StepPlan, result: StepResult) -> None:
        """Add a step's tokens to their requests. Tokens after a stop or an abort are dropped.

        A request for which no token could be chosen ends with an error; the others continue.
        """
        for wanted, values in zip(plan.prompt_logprobs, result.prompt_logprobs):
            if wanted.request_id in self.requests:
                request, _ = self.requests[wanted.request_id]
                for offset, token_id in enumerate(wanted.token_ids):
                    found = of_row(token_id, values, offset, wanted.num_top, self._tokenizer)
                    request.prompt_logprobs[wanted.first + offset] = found
        for row, drafts in zip(plan.sampling.masked, result.drafts):
            if plan.request_ids[row] in self.requests:
                self.requests[plan.request_ids[row]][0].drafts = drafts
        starts = accumulate(map(len, result.tokens), initial=0)
        for row, (request_id, start) in enumerate(zip(plan.request_ids, starts)):
            token_ids = result.tokens[row]
            if not token_ids or request_id not in self.requests:
                continue
            request, stream = self.requests[request_id]
            num_top = request.params.logprobs
            if num_top is not None and result.logprobs is not None:
                request.logprobs += [
                    of_row(token_id, result.logprobs, place, num_top, self._tokenizer)
                    for place, token_id in enumerate(token_ids, start)
                    if token_id != NO_TOKEN
                ]
            num_fed = 1 if plan.is_prefill else plan.num_tokens[row]
            if num_fed > 1:
                self._scheduler.note_accepted(request, num_fed - 1, len(token_ids) - 1)
            self._grow(request, stream, num_fed, token_ids)

    def end(self, request_id: int, reason: str, error: Exception | None = None) -> None:
        """End a request now. Its last output waits in the outbox."""
        self._end(*self.requests[request_id], reason, [], error)

    def forget(self, request: Request) -> None:
        """Drop everything kept for a request except its row and blocks. Unknown requests are
        ignored."""
        self._preparation.drop(request.request_id)
        others = (other for other, _ in self.requests.values() if other is not request)
        self._held.release(request, others)
        self.requests.pop(request.request_id, None)

    def complete_ends(self) -> None:
        """After an interrupt: finish the end of requests whose last output is in the outbox."""
        for output in self.outbox.outputs:
            if output.finished and output.request_id in self.requests:
                self.forget(self.requests[output.request_id][0])

    def _grow(
        self, request: Request, stream: TextStream, num_fed: int, token_ids: list[int]
    ) -> None:
        """Add the new tokens of a step that fed `num_fed` tokens of a request."""
        if request.is_failing:
            self._scheduler.tokens_known(request, num_fed, [])
            self._scheduler.retry(request)
            return
        has_all = token_ids[-1] != NO_TOKEN
        known = token_ids if has_all else token_ids[:-1]
        self._scheduler.tokens_known(request, num_fed, known)
        if known:
            self._extend(request, stream, known)
        if has_all or request.request_id not in self.requests:
            return
        # The NaN may come from other tokens: attention multiplies the values of later tokens by 0,
        # and 0 · NaN is NaN. So wrong proposals reach the tokens before them, and shared blocks may
        # hold NaN from the request that computed them.
        is_shared = request.num_shared or num_fed > len(token_ids)
        has_error = request.constraint is not None and request.constraint.error is not None
        if not request.no_sharing and is_shared and not has_error:
            self._scheduler.retry(request)
        else:
            self._fail(request, stream)

    def _fail(self, request: Request, stream: TextStream) -> None:
        """End a request for which no token could be chosen.

        Later requests do not share its blocks: they may hold NaN.
        """
        error = request.without_token
        logger.error("request %d: %s", request.request_id, error)
        self._scheduler.cache.evict([request])
        self._end(request, stream, "error", [], error)

    def _extend(self, request: Request, stream: TextStream, token_ids: list[int]) -> None:
        """Output a request's new `token_ids`, cut after the token that ends the request."""
        num_before = len(request.output_ids) - len(token_ids)
        for num, token_id in enumerate(token_ids, start=1):
            num_outputs = num_before + num
            stop_ids = request.stop_ids if num_outputs >= request.params.min_tokens else ()
            hit_stop_string = stream.push(stream.shown([token_id], stop_ids))
            stops = hit_stop_string or token_id in stop_ids
            if request.constraint is not None and not stops:
                request.constraint.push(token_id)
                stops = request.constraint.is_ended
            if stops or num_outputs >= request.max_output:
                del request.output_ids[num_outputs:], request.logprobs[num_outputs:]
                reason = "stop" if stops else "length"
                self._end(request, stream, reason, token_ids[:num])
                return
        if stream.incremental:
            logprobs = _newest_logprobs(request, len(token_ids))
            text = stream.take(last=False)
            self.outbox.outputs.append(OutputDelta(request.request_id, token_ids, text, logprobs))

    def _end(
        self,
        request: Request,
        stream: TextStream,
        reason: str,
        token_ids: list[int],
        error: Exception | None = None,
    ) -> None:
        """End a request. The output comes first: `complete_ends` does the rest after Ctrl-C."""
        if stream.stop_string is None:
            stop_ids = request.stop_ids if reason == "stop" else ()
            stream.finish(stream.shown(request.output_ids, stop_ids))
        stop_reason = stream.stop_string or _stop_token(request, reason)
        completion = FinishedOutput.of(request, stream.text, reason, stop_reason, error)
        logprobs = _newest_logprobs(request, len(token_ids))
        piece = stream.take(last=True)
        self.outbox.outputs.append(
            OutputDelta(request.request_id, token_ids, piece, logprobs, completion)
        )
        self._scheduler.finish(request, reason)
        self.forget(request)
        self._metrics.finished(request, reason)


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
