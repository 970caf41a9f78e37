"""The engine takes requests and returns increments, step by step. `LLM` and servers use it."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Container, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.runner.runner import Launched, Runner
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.blocks import BlockPool
from nanovllm.schedule.outputs import Completion, RequestOutput, TextStream
from nanovllm.schedule.plan import Logprobs, StepPlan, StepResult
from nanovllm.schedule.request import Content, Request
from nanovllm.schedule.scheduler import Proposer, Scheduler
from nanovllm.startup.load import Loaded, load

logger = logging.getLogger(__name__)


class LLMEngine:
    """Call `add_request`, then `step` until a request's last output, or `abort`.

    Use an engine from one thread only. Two engines share nothing.
    """

    @classmethod
    def from_options(cls, model: str, **options: Any) -> LLMEngine:
        """Load a model and warm up. Options are `EngineConfig` fields; others raise TypeError."""
        return cls(load(EngineConfig.from_options(model, options)))

    def __init__(self, loaded: Loaded) -> None:
        config = loaded.config
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
            max_proposals=max(layout.verify_tokens, default=1) - 1,
        )
        self.run_ahead = (
            self._runner.platform.traits.run_ahead if config.run_ahead is None else config.run_ahead
        )
        self._in_flight: deque[Launched] = deque()
        self._requests: dict[int, tuple[Request, TextStream]] = {}
        self._outputs: list[RequestOutput] = []  # not yet taken
        self._num_added = 0
        self._is_closed = False

    def close(self) -> None:
        """Free the memory of weights, cache and graphs."""
        self._is_closed = True
        self._in_flight.clear()
        self._requests.clear()
        self._runner.close()

    def __del__(self) -> None:
        if hasattr(self, "_runner"):
            self.close()

    @property
    def runner(self) -> Runner:
        return self._runner

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
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        incremental: bool = True,
        embeddings: Sequence[tuple[int, Tensor]] = (),
    ) -> int:
        """Queue a prompt (text or token ids); returns the request's id.

        With `incremental` False the request has one output, at its end. `embeddings` are (position,
        [n, D]) pairs: they replace the embeddings of n prompt tokens from this position on; the ids
        of these tokens are not read.

        Raises ValueError, and queues nothing, if the prompt is empty, too long or has ids outside
        the vocabulary, or if embeddings do not fit the prompt or the model.
        """
        self._check_open()
        params = params or SamplingParams()
        prompt_ids = self._prompt_ids(prompt)
        if params.stop_strings and self.tokenizer is None:
            raise ValueError(
                f"stop={list(params.stop_strings)} needs a tokenizer: "
                f"{self.config.model!r} does not have one"
            )
        contents = self._contents(embeddings, len(prompt_ids))
        for content, (_, embeds) in zip(contents, embeddings):
            self._runner.add_embeddings(content.key, embeds)
        request_id = self._num_added
        self._num_added += 1
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos_ids)}
        request = Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            params=params,
            seed=self._seed(params, request_id),
            max_output=min(params.max_tokens, self.max_model_len - len(prompt_ids)),
            stop_ids=frozenset(i for i in stop_ids if i < self.model_config.vocab_size),
            incremental=incremental,
            contents=contents,
        )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(prompt_ids)
        stream = TextStream(self.tokenizer, params.stop_strings, incremental)
        self._requests[request_id] = (request, stream)
        self.scheduler.add(request)
        return request_id

    def abort(self, request_id: int) -> None:
        """End a request now. Unknown ids are ignored.

        The next step returns the request's last output, with finish_reason "abort".
        """
        if request_id in self._requests:
            self._outputs.append(self._end(*self._requests[request_id], "abort", []))

    def abort_all(self, request_ids: Iterable[int]) -> None:
        """End requests and drop their last outputs, for a caller that no longer listens."""
        dropped = set(request_ids)
        for request_id in dropped:
            self.abort(request_id)
        self._outputs = [output for output in self._outputs if output.request_id not in dropped]

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests or self._outputs)

    def step(self) -> list[RequestOutput]:
        """`advance`, then `take` all outputs. The list can be empty while steps are in flight."""
        self.advance()
        return self.take()

    def take(self, request_ids: Container[int] | None = None) -> list[RequestOutput]:
        """Remove and return the waiting outputs of these requests, or of all requests."""
        if request_ids is None:
            taken, self._outputs = self._outputs, []
            return taken
        taken = [output for output in self._outputs if output.request_id in request_ids]
        if taken:
            left = [output for output in self._outputs if output.request_id not in request_ids]
            self._outputs = left
        return taken

    def advance(self) -> None:
        """Launch the next step and collect the results of an earlier one.

        An error or Ctrl-C leaves the engine usable: unfinished requests continue from their known
        tokens.
        """
        self._check_open()
        try:
            plan = self.scheduler.schedule(may_preempt=not self._in_flight)
            if plan is not None:
                self._in_flight.append(self._runner.launch(plan))
            if self._in_flight and (plan is None or len(self._in_flight) > self.run_ahead):
                launched = self._in_flight.popleft()
                self._collect(launched.plan, launched.wait())
            elif plan is None and self.scheduler.has_work:
                raise AssertionError("there is work, but no step can run")
        except BaseException:
            self._in_flight.clear()
            self.scheduler.restart(request for request, _ in self._requests.values())
            raise

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
        # the usual case: no Python loop over the tokens
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
                    f"token id {token_id!r} is outside the vocabulary: ids are whole numbers, "
                    f"0 … {vocab_size - 1}"
                )
        if len(prompt_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens: with max_model_len {self.max_model_len} "
                f"at most {self.max_model_len - 1} fit, since the answer needs at least one"
            )
        return prompt_ids

    def _seed(self, params: SamplingParams, request_id: int) -> int:
        if params.seed is not None:
            return params.seed
        digest = hashlib.sha256(f"{self.config.seed} {request_id}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def _contents(
        self, embeddings: Sequence[tuple[int, Tensor]], prompt_len: int
    ) -> tuple[Content, ...]:
        """The position, length and digest of each of the given embeddings."""
        contents: list[Content] = []
        hidden_size = self.model_config.hidden_size
        for start, embeds in embeddings:
            shape = list(embeds.shape)
            if len(shape) != 2 or shape[1] != hidden_size or not shape[0]:
                raise ValueError(f"embeddings have shape {shape}: it must be [n, {hidden_size}]")
            if start < 0 or start + shape[0] > prompt_len:
                raise ValueError(
                    f"{shape[0]} embeddings from position {start} on do not fit a prompt of "
                    f"{prompt_len} tokens"
                )
            values = embeds.detach().cpu().contiguous().view(torch.uint8).numpy()
            digest = hashlib.sha256(f"{embeds.dtype} {shape}".encode() + values.tobytes()).digest()
            contents.append(Content(start, shape[0], digest))
        ends = sorted((one.start, one.start + one.num) for one in contents)
        if any(start < end for (_, end), (start, _) in pairwise(ends)):
            raise ValueError(f"embeddings overlap: they lie at positions {ends}")
        return tuple(contents)

    def _collect(self, plan: StepPlan, result: StepResult) -> None:
        """Give a step's tokens to their requests. Tokens after a stop or an abort are dropped."""
        for wanted, values in zip(plan.prompt_logprobs, result.prompt_logprobs):
            if wanted.request_id in self._requests:
                request, _ = self._requests[wanted.request_id]
                for offset, token_id in enumerate(wanted.token_ids):
                    found = _logprob_dict(token_id, values, offset, wanted.num_top)
                    request.prompt_logprobs[wanted.first + offset] = found
        for row, request_id in enumerate(plan.request_ids):
            token_ids = result.tokens[row]
            if not token_ids or request_id not in self._requests:
                continue
            request, stream = self._requests[request_id]
            if request.params.logprobs is not None and result.logprobs is not None:
                found = _logprob_dict(token_ids[0], result.logprobs, row, request.params.logprobs)
                request.logprobs.append(found)
            num_fed = 1 if plan.is_prefill else plan.num_tokens[row]
            self.scheduler.tokens_known(request, num_fed, token_ids)
            output = self._output(request, stream, token_ids)
            if output is not None:
                self._outputs.append(output)

    def _output(
        self, request: Request, stream: TextStream, token_ids: list[int]
    ) -> RequestOutput | None:
        """The output for a request's new `token_ids`, cut after the token that ends the request."""
        num_before = len(request.output_ids) - len(token_ids)
        for num, token_id in enumerate(token_ids, start=1):
            num_outputs = num_before + num
            may_stop = num_outputs >= request.params.min_tokens
            hit_stop_string = stream.grows and stream.push([token_id], may_stop=may_stop)
            stops = hit_stop_string or (may_stop and token_id in request.stop_ids)
            if stops or num_outputs >= request.max_output:
                del request.output_ids[num_outputs:]
                reason = "stop" if stops else "length"
                return self._end(request, stream, reason, token_ids[:num], cut=hit_stop_string)
        if not stream.incremental:
            return None
        return RequestOutput(request.request_id, token_ids, stream.take(last=False))

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
        if request.contents:
            in_use = {one.key for other, _ in self._requests.values() for one in other.contents}
            self._runner.drop_embeddings({one.key for one in request.contents} - in_use)
        completion = Completion.of(request, stream.text, reason)
        return RequestOutput(request.request_id, token_ids, stream.take(last=True), completion)


def _logprob_dict(token_id: int, values: Logprobs, row: int, wanted: int) -> dict[int, float]:
    """Log-probabilities of a row's `wanted` likeliest tokens and of `token_id`, descending."""
    top_ids, top = values.top_token_NL[row].tolist(), values.top_NL[row].tolist()
    found = dict(zip(top_ids[:wanted], top[:wanted]))
    found.setdefault(token_id, float(values.chosen_N[row]))
    return dict(sorted(found.items(), key=lambda item: -item[1]))
