"""The client's side of one answer: receives tokens from the engine and detokenizes them."""

from __future__ import annotations

from nanovllm.outputs import TopLogprobs
from nanovllm.replicas.messages import Done, RowTokens, logprobs, pooled_of, prompt_logprobs
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.outputs import FinishedOutput, OutputDelta, TextStream
from nanovllm.tokenizer import Tokenizer


class Answer:
    """Decodes tokens and finds stop strings, as the engine does for `LLM`.

    Tokens are decoded when they are read, several at once for a slow reader. With stop strings they
    are decoded as they arrive.

    index: the answer's number for its prompt. done: the finished output, once it has ended.
    """

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        prompt_ids: list[int],
        tokenizer: Tokenizer | None,
        *,
        incremental: bool,
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.index, self._prompt_ids = index, prompt_ids
        self._tokenizer, self.incremental = tokenizer, incremental
        self._has_stops = bool(params.stop)
        self._stop_ids = params.stop_ids(eos_ids)
        self._text = TextStream(tokenizer, params, incremental=incremental)
        self._token_ids: list[int] = []
        self._logprobs: list[TopLogprobs] | None = None if params.logprobs is None else []
        self._num_decoded = self._num_taken = 0  # tokens
        self._end: Done | None = None  # as the engine sent it
        self._prompt_logprobs: list[TopLogprobs | None] | None = None  # once unpacked
        self.done: FinishedOutput | None = None

    def add_token(self, token_id: int) -> bool:
        """Add the next token, which comes alone. Returns whether a stop string ends the text there;
        the engine does not check stop strings."""
        if not self._has_stops:
            self._token_ids.append(token_id)
            return False
        if self._has_stopped:
            return False
        self._token_ids.append(token_id)
        self._decode()
        return self._has_stopped

    def add(self, row: RowTokens) -> bool:
        """Add any number of tokens and, if present, the end. Returns the same as `add_token`."""
        self._end = row.done
        if self._has_stopped:
            return False
        self._token_ids += row.token_ids
        if self._logprobs is not None:
            self._logprobs += logprobs(row.logprobs, self._tokenizer) or []
        if self._has_stops:
            self._decode()
        return self._has_stopped

    @property
    def _has_stopped(self) -> bool:
        return self._text.stop_string is not None

    def take(self) -> OutputDelta | None:
        """The output since the last call; None if there is none."""
        if self.done is not None:
            return None
        self._decode()
        if self._end is not None:
            self.done = self._completion(self._end)
        elif self._num_taken == len(self._token_ids):
            return None
        first, self._num_taken = self._num_taken, len(self._token_ids)
        return OutputDelta(
            self.index,
            self._token_ids[first:],
            self._text.take(last=self.done is not None),
            None if self._logprobs is None else self._logprobs[first:],
            self.done,
        )

    @property
    def num_packed(self) -> int:
        """The bytes of the prompt's log-probabilities that are not unpacked yet."""
        if self._end is None or self._prompt_logprobs is not None:
            return 0
        return len(self._end.prompt_logprobs or b"")

    def unpack(self) -> None:
        """Unpack the prompt's log-probabilities. `take` does it, unless another thread has."""
        if self._end is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = prompt_logprobs(self._end, self._tokenizer)

    def end(self, reason: str, error: str | None = None) -> None:
        """End the answer with the tokens received so far."""
        if self._end is None:
            self._end = Done(reason, None, 0, None, error)

    def _decode(self) -> None:
        """Decode the tokens received so far, up to a stop string."""
        if not self._text.grows or self._has_stopped:
            return
        num, self._num_decoded = self._num_decoded, len(self._token_ids)
        fresh = self._shown()[num:]
        if not self._has_stops:
            if fresh:
                self._text.push(fresh)
            return
        for token_id in fresh:
            num += 1
            if self._text.push([token_id]):
                del self._token_ids[num:]
                if self._logprobs is not None:
                    del self._logprobs[num:]
                return

    def _shown(self) -> list[int]:
        """The tokens received so far, without a stop token that the text leaves out."""
        has_stopped = self._end is not None and self._end.finish_reason == "stop"
        return self._text.shown(self._token_ids, self._stop_ids if has_stopped else ())

    def _completion(self, end: Done) -> FinishedOutput:
        self.unpack()
        text, reason = self._text, "stop" if self._has_stopped else end.finish_reason
        if not self._has_stopped:
            text.finish(self._shown())
        return FinishedOutput(
            text=text.text,
            token_ids=self._token_ids,
            finish_reason=reason,
            stop_reason=text.stop_string or end.stop_reason,
            prompt_ids=self._prompt_ids,
            num_cached_tokens=end.num_cached_tokens,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            error=end.error,
            error_field=end.error_field,
            pooled=pooled_of(end),
        )
