"""The engine: requests in, increments out, one step at a time. Everything above it (offline, server) sits on this."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.runner.runner import Launched, Runner
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.blocks import BlockPool
from nanovllm.schedule.outputs import Completion, RequestOutput, TextStream
from nanovllm.schedule.request import Request, Status
from nanovllm.schedule.scheduler import Scheduler
from nanovllm.startup import load as startup
from nanovllm.startup.compile_farm.processes import Server

logger = logging.getLogger(__name__)


class LLMEngine:
    """`add_request`, `step` until a request's last output, `abort`; from one thread. Two engines share nothing."""

    def __init__(self, model: str, *, server: Server | None = None, **options: Any) -> None:
        """Load a model and warm up. Options are the fields of `EngineConfig`; raises TypeError for others. A `server` was begun
        for the same options."""
        config = EngineConfig.from_options(model, options)
        loaded = startup.load(config, server)
        self.config, self.tokenizer, self.model_config = config, loaded.tokenizer, loaded.runner.cfg
        self.load_seconds, self.memory = loaded.seconds, loaded.memory
        self._runner, self._eos_ids = loaded.runner, loaded.eos_ids
        layout = self._runner.layout
        self.max_model_len = layout.max_model_len
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
        )
        self.run_ahead = (
            self._runner.platform.run_ahead if config.run_ahead is None else config.run_ahead
        )
        self._in_flight: deque[Launched] = deque()
        self._requests: dict[int, tuple[Request, TextStream]] = {}
        self._outputs: list[RequestOutput] = []  # not yet handed out
        self._num_added = 0
        self._is_closed = False

    def close(self) -> None:
        """Drop weights, cache and graphs and give their memory back to the device."""
        self._is_closed = True
        self._in_flight.clear()
        self._requests.clear()
        self._runner.close()

    def __del__(self) -> None:
        if hasattr(self, "_runner"):
            self.close()

    @property
    def platform_name(self) -> str:
        return self._runner.platform.name

    @property
    def runner(self) -> Runner:
        return self._runner

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        incremental: bool = True,
    ) -> int:
        """Queue a prompt (text or token ids); returns the request's id. `incremental` False: one output, at the end.

        Raises ValueError, and queues nothing, for a prompt that is empty, too long or has ids outside the vocabulary.
        """
        self._check_open()
        params = params or SamplingParams()
        prompt_ids = self._prompt_ids(prompt)
        if params.stop_strings and self.tokenizer is None:
            raise ValueError(
                f"stop={list(params.stop_strings)} needs a tokenizer, which {self.config.model!r} has not"
            )
        request_id = self._num_added
        self._num_added += 1
        request = Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            params=params,
            seed=self._seed(params, request_id),
            max_output=min(params.max_tokens, self.max_model_len - len(prompt_ids)),
            stop_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self._eos_ids),
            incremental=incremental,
        )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(prompt_ids)
        self._requests[request_id] = (
            request,
            TextStream(self.tokenizer, params.stop_strings, incremental),
        )
        self.scheduler.add(request)
        return request_id

    def abort(self, request_id: int) -> None:
        """End a request now; its last output, with finish_reason "abort", comes with the next step. Unknown ids: no-op."""
        if request_id in self._requests:
            self._outputs.append(self._end(*self._requests[request_id], "abort", []))

    def abort_all(self, request_ids: Iterable[int]) -> None:
        """End requests and drop their last outputs, for a caller that no longer listens."""
        dropped = set(request_ids)
        for request_id in dropped:
            self.abort(request_id)
        self._outputs = [output for output in self._outputs if output.request_id not in dropped]

    def keep(self, outputs: Sequence[RequestOutput]) -> None:
        """Take outputs back for the next `step` to return: they are of requests that its caller does not know."""
        self._outputs[:0] = outputs

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests or self._outputs)

    def step(self) -> list[RequestOutput]:
        """Launch the next step and return what an earlier one has brought; may be empty while steps are in flight.

        An error or Ctrl-C leaves the engine usable: unfinished requests go on from the tokens that are known.
        """
        self._check_open()
        try:
            plan = self.scheduler.schedule(may_preempt=not self._in_flight)
            if plan is not None:
                self._in_flight.append(self._runner.launch(plan))
            if self._in_flight and (plan is None or len(self._in_flight) > self.run_ahead):
                self._collect(self._in_flight.popleft())
            elif plan is None and self.scheduler.has_work:
                raise AssertionError("there is work, but no step can run")
        except BaseException:
            self._in_flight.clear()
            self.scheduler.restart(request for request, _ in self._requests.values())
            raise
        outputs, self._outputs = self._outputs, []
        return outputs

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this engine is closed: load the model again")

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{self.config.model!r} has no tokenizer: give token ids instead of text"
                )
            prompt_ids = list(self.tokenizer.encode(prompt))
        elif isinstance(prompt, Iterable):
            prompt_ids = list(prompt)
        else:
            raise ValueError(f"the prompt is {prompt!r}: it must be text or a list of token ids")
        if not prompt_ids:
            raise ValueError("the prompt is empty: it must have at least 1 token")
        vocab_size = self.model_config.vocab_size
        # the usual case without a Python step for each token
        are_fine = (
            set(map(type, prompt_ids)) == {int}
            and min(prompt_ids) >= 0
            and max(prompt_ids) < vocab_size
        )
        for token_id in () if are_fine else prompt_ids:
            if (
                isinstance(token_id, bool)
                or not isinstance(token_id, int)
                or not 0 <= token_id < vocab_size
            ):
                raise ValueError(
                    f"token id {token_id!r} is outside the vocabulary: ids are whole numbers, 0 … {vocab_size - 1}"
                )
        if len(prompt_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens: with max_model_len {self.max_model_len} at most "
                f"{self.max_model_len - 1} fit, since one must be left for the answer"
            )
        return prompt_ids

    def _seed(self, params: SamplingParams, request_id: int) -> int:
        if params.seed is not None:
            return params.seed
        digest = hashlib.sha256(f"{self.config.seed} {request_id}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def _collect(self, launched: Launched) -> None:
        """Read a step's tokens and hand them to their requests; tokens past a stop or an abort are dropped."""
        token_ids = launched.tokens.tolist()
        logprob_rows = launched.logprobs.rows() if launched.logprobs is not None else None
        for part in launched.prompt_logprobs:
            wanted = part.request.params.prompt_logprobs or 0
            for offset, values in enumerate(part.copies.rows()[: part.num]):
                token_id = part.request.prompt_ids[part.first + offset]
                part.request.prompt_logprobs[part.first + offset] = _logprob_dict(
                    token_id, values, wanted
                )
        for request, row in zip(launched.requests, launched.rows):
            request.num_in_flight -= 1
            if request.status is Status.FINISHED:
                continue
            token_id = token_ids[row]
            request.output_ids.append(token_id)
            if request.params.logprobs is not None and logprob_rows is not None:
                request.logprobs.append(
                    _logprob_dict(token_id, logprob_rows[row], request.params.logprobs)
                )
            self.scheduler.token_known(request)
            output = self._output(request, token_id)
            if output is not None:
                self._outputs.append(output)

    def _output(self, request: Request, token_id: int) -> RequestOutput | None:
        _, stream = self._requests[request.request_id]
        may_stop = len(request.output_ids) >= request.params.min_tokens
        hit_stop_string = stream.push([token_id], may_stop=may_stop)
        if hit_stop_string or (may_stop and token_id in request.stop_ids):
            return self._end(request, stream, "stop", [token_id], cut=hit_stop_string)
        if len(request.output_ids) >= request.max_output:
            return self._end(request, stream, "length", [token_id])
        return (
            RequestOutput(request.request_id, [token_id], stream.take(last=False))
            if stream.incremental
            else None
        )

    def _end(
        self,
        request: Request,
        stream: TextStream,
        reason: str,
        token_ids: list[int],
        *,
        cut: bool = False,
    ) -> RequestOutput:
        self.scheduler.finish(request, reason)
        if not cut:
            stream.finish(request, may_stop=len(request.output_ids) >= request.params.min_tokens)
        del self._requests[request.request_id]
        completion = Completion.of(request, stream.text, reason)
        return RequestOutput(request.request_id, token_ids, stream.take(last=True), completion)


def _logprob_dict(
    token_id: int, row: tuple[float, list[float], list[int]], wanted: int
) -> dict[int, float]:
    """The likeliest `wanted` tokens and the token itself, likeliest first."""
    chosen, top, top_ids = row
    found = dict(zip(top_ids[:wanted], top[:wanted]))
    found.setdefault(token_id, chosen)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
