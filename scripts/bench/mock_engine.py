"""An `AsyncEngine` that makes up tokens without a model, to test and measure servers.

Imports no torch.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from nanovllm.config import EngineConfig
from nanovllm.engine.metrics import PREFIX, Counter, Gauge, Metric
from nanovllm.lora_request import LoRARequest
from nanovllm.media import mm_inputs as media_given
from nanovllm.media.mm_inputs import MMInput
from nanovllm.outputs import TopLogprobs
from nanovllm.prompts import AnyPrompt, Prompt, PromptRefused, PromptTooLong, as_prompt
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.logprobs import Logprob
from nanovllm.serving.async_engine import Delta, Draining, EngineDead, QueueFull
from nanovllm.tokenizer import Tokenizer

MAX_PROMPT_ID = (1 << 31) - 1
VOCAB_SIZE = 512
CHECK_S = 0.005


@dataclass(frozen=True)
class MockOptions:
    """Its output, speed and queue.

    text: the text of every answer, one token per character. None: tokens chosen by the seed.

    tokens_per_s: per answer; inf: as fast as they are read. tokens_per_delta: used if
        tokens_per_s is inf.
    max_queue_len: the maximum number of waiting prompts.
    """

    text: str | None = None
    tokens_per_s: float = math.inf
    tokens_per_delta: int = 1
    max_model_len: int = 4096
    max_num_seqs: int = 256
    max_queue_len: int = 4096


class MockEngine:
    """Answers every prompt with tokens chosen by the seed, up to max_tokens or a stop string."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        options: MockOptions | None = None,
    ) -> None:
        self.config, self.tokenizer, self.pooling = config, tokenizer, None
        self.options = options or MockOptions()
        self.max_model_len = self.options.max_model_len
        self.max_num_seqs = self.options.max_num_seqs
        self.default_params = SamplingParams()
        self.eos_ids: frozenset[int] = frozenset()
        self.failure: EngineDead | None = None
        self.is_draining = False
        self.streams: dict[str, MockStream] = {}
        self.num_aborted = 0
        self._numbers = itertools.count()
        self._num_prompt_tokens = self._num_tokens = 0
        self._texts: dict[int, str] = {}

    def check_media(self, media: Sequence[MMInput]) -> None:
        media_given.refuse(self.config.model, media)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return True

    async def open(
        self,
        prompt: AnyPrompt | Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> MockStream:
        if self.failure is not None:
            raise self.failure
        if self.is_draining:
            raise Draining("the engine is draining and accepts no new requests")
        most = self.options.max_num_seqs + self.options.max_queue_len
        if len(self.streams) >= most:
            raise QueueFull(f"the queue has {self.options.max_queue_len} requests, its limit")
        params = params or self.default_params
        prompt_ids = self._prompt_ids(as_prompt(prompt), params.truncate_prompt_tokens)
        number = next(self._numbers)
        stream = MockStream(self, request_id or f"mock-{number}", prompt_ids, params, number)
        self.streams[stream.request_id] = stream
        self._num_prompt_tokens += len(prompt_ids)
        return stream

    def abort(self, request_id: str) -> None:
        if request_id in self.streams:
            self.streams[request_id].abort()

    async def metrics(self) -> list[Metric]:
        running = min(len(self.streams), self.max_num_seqs)
        return [
            Gauge(PREFIX + "num_requests_running", running),
            Gauge(PREFIX + "num_requests_waiting", len(self.streams) - running),
            Counter(PREFIX + "prompt_tokens", self._num_prompt_tokens),
            Counter(PREFIX + "generation_tokens", self._num_tokens),
        ]

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new prompts and wait until all answers end; at the timeout abort the rest."""
        self.is_draining = True
        end = math.inf if timeout is None else time.monotonic() + timeout
        while self.streams and time.monotonic() < end:
            await asyncio.sleep(CHECK_S)
        for stream in list(self.streams.values()):
            stream.abort()

    async def close(self) -> None:
        await self.drain(0)

    def fail(self, message: str) -> None:
        """Fail like an engine whose process has died."""
        self.failure = EngineDead(message)

    def text_of(self, token_id: int) -> str:
        if token_id not in self._texts:
            known = self.tokenizer
            self._texts[token_id] = known.decode([token_id]) if known else f" word{token_id}"
        return self._texts[token_id]

    def ended(self, stream: MockStream, num_tokens: int) -> None:
        self.streams.pop(stream.request_id, None)
        self._num_tokens += num_tokens

    def _prompt_ids(self, prompt: Prompt, most: int | None) -> list[int]:
        if prompt.token_ids is not None:
            token_ids = list(prompt.token_ids)
        elif self.tokenizer is not None:
            token_ids = self.tokenizer.encode(prompt.text or "")
        else:
            token_ids = [len(word) for word in (prompt.text or "").split()]
        if most is not None:
            token_ids = token_ids[-(most if most > 0 else self.max_model_len - 1) :]
        if not token_ids:
            raise PromptRefused("the prompt is empty: it must have at least 1 token")
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id <= MAX_PROMPT_ID:
                raise PromptRefused(f"token id {token_id!r} is outside the vocabulary")
        if len(token_ids) >= self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(token_ids)} tokens: with max_model_len {self.max_model_len} "
                f"at most {self.max_model_len - 1} fit, since the answer needs at least one"
            )
        return token_ids


@dataclass
class _Answer:
    """One answer. texts: of all its tokens, the last one cut at a stop string."""

    index: int
    token_ids: list[int]
    texts: list[str]
    stop: str | None
    num_given: int = 0
    is_ended: bool = field(default=False)


class MockStream:
    """The answers to one prompt."""

    def __init__(
        self,
        engine: MockEngine,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        number: int,
    ) -> None:
        self.request_id, self.prompt_token_ids = request_id, prompt_ids
        self._engine, self._params = engine, params
        self._seed = number if params.seed is None else params.seed
        self._is_aborted = False
        self._start = time.monotonic()
        left = engine.max_model_len - len(prompt_ids)
        self._num_tokens = left if params.max_tokens is None else min(left, params.max_tokens)

    def abort(self) -> None:
        if not self._is_aborted:
            self._is_aborted = True
            self._engine.num_aborted += self.request_id in self._engine.streams
            self._engine.ended(self, 0)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        options = self._engine.options
        answers = [self._answer(index) for index in range(self._params.n)]
        is_timed = math.isfinite(options.tokens_per_s)
        while any(not answer.is_ended for answer in answers):
            due: float = math.inf
            if is_timed:
                due = int((time.monotonic() - self._start) * options.tokens_per_s)
            num_given = 0
            for answer in answers:
                for delta in self._next(answer, due if is_timed else None):
                    num_given += 1
                    yield delta
            await asyncio.sleep(0 if num_given else 1 / options.tokens_per_s)
            if self._engine.failure is not None:
                raise self._engine.failure
        self._engine.ended(self, sum(answer.num_given for answer in answers))

    def _answer(self, index: int) -> _Answer:
        params, num = self._params, self._num_tokens
        first = self._seed + 31 * index
        token_ids = [(first + i) % VOCAB_SIZE for i in range(num)]
        texts = [self._engine.text_of(token_id) for token_id in token_ids]
        if self._engine.options.text is not None:
            texts = list(self._engine.options.text[:num])
            token_ids = token_ids[: len(texts)]
        answer = _Answer(index, token_ids, texts if params.detokenize else [""] * num, None)
        if params.stop_strings:
            _cut(answer, params.stop_strings)
        return answer

    def _next(self, answer: _Answer, due: float | None) -> Iterator[Delta]:
        """The next delta of an answer, if it is due: up to `due` tokens, or the usual number."""
        start, params = answer.num_given, self._params
        wanted = start + self._engine.options.tokens_per_delta if due is None else int(due)
        end = min(wanted, len(answer.token_ids))
        if answer.is_ended or (end <= start and not self._is_aborted):
            return
        answer.num_given = end = max(start, end)
        token_ids = answer.token_ids[start:end]
        delta = Delta(answer.index, "".join(answer.texts[start:end]), token_ids)
        if params.logprobs is not None:
            delta.logprobs = [self._logprobs(one, params.logprobs) for one in token_ids]
        if self._is_aborted or end == len(answer.token_ids):
            answer.is_ended = True
            has_ended = answer.stop is not None or end < self._num_tokens
            delta.finish_reason = "stop" if has_ended else "length"
            delta.stop_reason = answer.stop
            if self._is_aborted:
                delta.finish_reason = "abort"
            if params.prompt_logprobs is not None and answer.index == 0:
                given = self.prompt_token_ids[1:]
                found = [self._logprobs(one, params.prompt_logprobs) for one in given]
                delta.prompt_logprobs = [None, *found]
        yield delta

    def _logprobs(self, token_id: int, num_top: int) -> TopLogprobs:
        """Log-probabilities in which the token is always the most likely one."""
        ids = [token_id, *((token_id + i) % VOCAB_SIZE for i in range(1, num_top))]
        tokenizer = self._engine.tokenizer
        return {one: Logprob(-0.5 * r, r, one, tokenizer) for r, one in enumerate(ids, 1)}


def _cut(answer: _Answer, stops: Sequence[str]) -> None:
    """End the answer where a stop string begins."""
    text = "".join(answer.texts)
    found = [(place, stop) for stop in stops if (place := text.find(stop)) >= 0]
    if not found:
        return
    place, answer.stop = min(found)
    ends = itertools.accumulate(map(len, answer.texts))
    num = 1 + next(i for i, end in enumerate(ends) if end >= place + len(answer.stop))
    answer.token_ids, texts = answer.token_ids[:num], answer.texts[:num]
    kept, answer.texts = place, []
    for piece in texts:
        answer.texts.append(piece[:kept])
        kept -= len(answer.texts[-1])
