"""The outputs of the engine, and the search for the end of a request's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.schedule.request import Request
from nanovllm.tokenizer import GrowingText


@dataclass(frozen=True)
class Completion:
    """The whole output of a finished request."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" | "length" | "abort"
    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens found in the prefix cache
    logprobs: list[dict[int, float]] | None  # per generated token
    prompt_logprobs: list[dict[int, float] | None] | None  # per prompt token; None for the first

    @classmethod
    def of(cls, request: Request, text: str, finish_reason: str) -> Completion:
        params = request.params
        return cls(
            text=text,
            token_ids=request.output_ids,
            finish_reason=finish_reason,
            num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=request.num_cached or 0,
            logprobs=request.logprobs if params.logprobs is not None else None,
            prompt_logprobs=request.prompt_logprobs if params.prompt_logprobs is not None else None,
        )


@dataclass(frozen=True)
class RequestOutput:
    """One request's new tokens and text. Its last output also holds the whole completion."""

    request_id: int
    token_ids: list[int]
    text: str
    completion: Completion | None = None

    @property
    def finished(self) -> bool:
        return self.completion is not None


@dataclass
class TextStream:
    """The text of one request. Decodes it step by step if necessary, and finds stop strings.

    The end of the text is held back while it may be the beginning of a stop string.
    """

    tokenizer: Any | None
    stop_strings: tuple[str, ...]
    incremental: bool
    text: str = ""
    _growing: GrowingText | None = field(default=None, repr=False)
    _num_given: int = 0  # characters taken so far

    def __post_init__(self) -> None:
        if self.tokenizer is not None and (self.incremental or self.stop_strings):
            self._growing = GrowingText(self.tokenizer)

    @property
    def grows(self) -> bool:
        """True if the text is decoded token by token, and not at the end."""
        return self._growing is not None

    def push(self, token_ids: Sequence[int], *, may_stop: bool) -> bool:
        """Add tokens. True if they complete a stop string: the text then ends before it."""
        if self._growing is None:
            return False
        searched_from = len(self.text)
        self._growing.append(token_ids)
        self.text = self._growing.text
        return may_stop and self._cut(searched_from)

    def finish(self, request: Request, *, may_stop: bool) -> None:
        """End the text: add unfinished characters, or decode all tokens now."""
        if self._growing is not None:
            searched_from = len(self.text)
            self._growing.flush()
            self.text = self._growing.text
            if may_stop:
                self._cut(searched_from)
        elif self.tokenizer is not None:
            self.text = self.tokenizer.decode(request.output_ids, skip_special_tokens=True)

    def take(self, *, last: bool) -> str:
        """The new text, without the end that is held back; all new text if `last`."""
        end = len(self.text) if last else max(self._num_given, len(self.text) - self._held_back())
        piece = self.text[self._num_given : end]
        self._num_given = end
        return piece

    def _cut(self, searched_from: int) -> bool:
        # A match must end in new text: the old text was searched before, or must not stop the
        # request and may have been taken.
        found = (
            self.text.find(stop, max(0, searched_from - len(stop) + 1))
            for stop in self.stop_strings
        )
        places = [place for place in found if place >= 0]
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    def _held_back(self) -> int:
        """Length of the longest suffix of the text that is a proper prefix of a stop string."""
        return max(
            (
                size
                for stop in self.stop_strings
                for size in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )
