"""The outputs of the engine, and the search for the end of a request's text."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanovllm.checks import InvalidValue
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.incremental_text import IncrementalText
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.request import Request
from nanovllm.schedule.stop_strings import stop_strings
from nanovllm.tokenizer import Decoding, Tokenizer

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class FinishedOutput:
    """The whole output of a finished request.

    stop_reason: the stop string, or the one of `stop_token_ids`, that ended the text.
    num_cached_tokens: prompt tokens found in the prefix cache.
    logprobs: per generated token. prompt_logprobs: per prompt token, None for the first.
    error: what went wrong, for finish_reason "error". error_field: the parameter that caused it, if
        any.
    pooled: the result of a model that pools, fp32 [O].
    """

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" | "length" | "abort" | "error"
    stop_reason: str | int | None
    prompt_ids: list[int]
    num_cached_tokens: int
    logprobs: list[dict[int, Logprob]] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    error: str | None = None
    error_field: str | None = None
    pooled: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        request: Request,
        text: str,
        finish_reason: str,
        stop_reason: str | int | None,
        error: Exception | None = None,
    ) -> FinishedOutput:
        params = request.params
        return cls(
            text=text,
            token_ids=request.output_ids,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            prompt_ids=request.prompt_ids,
            num_cached_tokens=request.num_cached or 0,
            logprobs=request.logprobs if params.logprobs is not None else None,
            prompt_logprobs=request.prompt_logprobs if params.prompt_logprobs is not None else None,
            error=None if error is None else str(error),
            error_field=error.field if isinstance(error, InvalidValue) else None,
        )


@dataclass(frozen=True)
class OutputDelta:
    """One request's new tokens, their log-probabilities if requested, and the new text. Its last
    increment also holds the completion."""

    request_id: int
    token_ids: list[int]
    text: str
    logprobs: list[dict[int, Logprob]] | None = None
    completion: FinishedOutput | None = None

    @property
    def finished(self) -> bool:
        return self.completion is not None

    def __add__(self, later: OutputDelta) -> OutputDelta:
        """This increment and the next one of the same request as one."""
        no_logprobs = self.logprobs is None and later.logprobs is None
        return OutputDelta(
            self.request_id,
            self.token_ids + later.token_ids,
            self.text + later.text,
            None if no_logprobs else (self.logprobs or []) + (later.logprobs or []),
            later.completion,
        )


@dataclass
class Outbox:
    """Outputs of requests until they are taken."""

    outputs: list[OutputDelta] = field(default_factory=list)

    def has(self, request_ids: Container[int] | None = None) -> bool:
        """Whether there are outputs of these requests, or of any."""
        if request_ids is None:
            return bool(self.outputs)
        return any(output.request_id in request_ids for output in self.outputs)

    def take(self, request_ids: Container[int] | None = None) -> list[OutputDelta]:
        """Remove and return the outputs of these requests, or of all."""
        if request_ids is None:
            taken, self.outputs = self.outputs, []
            return taken
        taken = [output for output in self.outputs if output.request_id in request_ids]
        if taken:
            left = [output for output in self.outputs if output.request_id not in request_ids]
            self.outputs = left
        return taken


class TextStream:
    """The text of one request. Decodes it step by step if necessary, and finds stop strings.

    The end of the text is held back while it may be the beginning of a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, params: SamplingParams, *, incremental: bool
    ) -> None:
        self.incremental = incremental
        self.stop_string: str | None = None  # the one that ended the text
        self._tokenizer = tokenizer if params.detokenize else None
        self._how = Decoding(params.skip_special_tokens, params.spaces_between_special_tokens)
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens, self._num_tokens = params.min_tokens, 0  # of pushed tokens
        self._stops = stop_strings(params.stop_strings) if params.stop_strings else None
        self._growing: IncrementalText | None = None
        if self._tokenizer is not None and (incremental or self._stops):
            self._growing = IncrementalText(self._tokenizer, self._how)
        self._state = 0  # of the automaton, after `text`
        # The taken text and the new text, in pieces: joining them for each token would copy a long
        # text each time.
        self._taken: list[str] = []
        self._new: list[str] = []

    @property
    def text(self) -> str:
        """The whole text so far. Joins its pieces, so do not call it for each token."""
        return "".join(self._taken + self._new)

    @property
    def grows(self) -> bool:
        """True if the text is decoded token by token, and not at the end."""
        return self._growing is not None

    def shown(self, token_ids: list[int], stop_ids: Container[int]) -> list[int]:
        """The tokens with text, of an answer that ended with reason "stop": the stop token that
        ended it has none, unless the params include it."""
        is_hidden = bool(token_ids) and token_ids[-1] in stop_ids and not self._includes_stop
        return token_ids[:-1] if is_hidden else token_ids

    def push(self, token_ids: Sequence[int]) -> bool:
        """Add tokens. True if they complete a stop string: the text then ends there.

        As in vLLM a stop string that is complete within the first `min_tokens` tokens does not
        count, and one that only begins there does.
        """
        if self._growing is None or not token_ids:
            return False
        num_early = max(0, self._min_tokens - self._num_tokens)
        self._num_tokens += len(token_ids)
        if num_early:
            self._add(self._growing.append(token_ids[:num_early]), may_stop=False)
            token_ids = token_ids[num_early:]
        return bool(token_ids) and self._add(self._growing.append(token_ids), may_stop=True)

    def finish(self, token_ids: Sequence[int]) -> None:
        """End the text of all these tokens: add unfinished characters, or decode them now."""
        if self._growing is not None:
            self._add(self._growing.flush(), may_stop=self._num_tokens > self._min_tokens)
        elif self._tokenizer is not None:
            self._new = [self._tokenizer.decode(token_ids, self._how)]

    def take(self, *, last: bool) -> str:
        """The new text, without the end that is held back; all new text if `last`."""
        new, num_held = "".join(self._new), 0
        if not last and self._stops is not None and not self._includes_stop:
            num_held = min(len(new), self._stops.num_held[self._state])
        piece, held = new[: len(new) - num_held], new[len(new) - num_held :]
        self._taken.append(piece)
        self._new = [held] if held else []
        return piece

    def _add(self, piece: str, *, may_stop: bool) -> bool:
        self._new.append(piece)
        if self._stops is None:
            return False
        # A match ends in new text: the old text was searched before, or must not end the request
        # and may have been taken.
        self._state, match = self._stops.search(self._state, piece)
        if match is None or not may_stop:
            return False
        place, self.stop_string = match
        # its place is counted from the beginning of the piece
        end = place - len(piece) + (len(self.stop_string) if self._includes_stop else 0)
        self._cut(-end)
        return True

    def _cut(self, num: int) -> None:
        """Remove the last characters."""
        for pieces in (self._new, self._taken):
            whole = "".join(pieces)
            pieces[:] = [whole[: max(0, len(whole) - num)]]
            num = max(0, num - len(whole))
