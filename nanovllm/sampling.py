"""The sampling options of one request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_LOGPROBS = 100
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token, and when to stop.

    temperature: logits are divided by it. 0 is greedy, and so is any value below 1e-6, for which
        quotients would overflow.
    min_p, top_k, top_p: filters, applied in this order. min_p keeps tokens with probability >=
        min_p times the largest; top_k keeps the k likeliest tokens (0 or -1: all); top_p keeps the
        smallest set of likeliest tokens with total probability >= top_p.
    repetition_penalty: for tokens in prompt or output, positive logits are divided by it and
        negative ones multiplied.
    presence_penalty, frequency_penalty: subtracted from logits of generated tokens, once per token
        and once per occurrence.
    seed: the same seed gives the same tokens in any batch. None draws a seed from the engine's.
    max_tokens, min_tokens: limits on generated tokens. Stop tokens and stop strings end no request
        before min_tokens.
    stop: strings that end the text, which does not include them.
    stop_token_ids: ids that end the text; token_ids includes them.
    ignore_eos: the model's end-of-sequence ids do not end the request.
    logprobs, prompt_logprobs: the number of likeliest tokens to report per position, beside the
        token itself: log-softmax of the model's logits, before penalties and temperature.
    n: the number of independent answers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 64
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _finite("temperature", self.temperature, 0.0, math.inf)
        _finite("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _finite("min_p", self.min_p, 0.0, 1.0)
        _finite("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _finite("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _finite("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _whole("top_k", self.top_k, -1, 2**31 - 1)
        _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _whole("n", self.n, 1)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)
        given = (
            () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        )
        stops = tuple(given) if isinstance(given, Iterable) else (given,)
        if any(not isinstance(text, str) or not text for text in stops):
            raise ValueError(f"stop must hold non-empty strings, not {self.stop!r}")
        if not isinstance(self.stop_token_ids, Iterable):
            raise ValueError(
                f"stop_token_ids must be a list of token ids, not {self.stop_token_ids!r}"
            )
        stop_token_ids = tuple(self.stop_token_ids)
        for token_id in stop_token_ids:
            _whole("stop_token_ids", token_id, 0)
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def is_plain(self) -> bool:
        """True if only the temperature matters: the sampler in the step's graph is enough."""
        filtered = self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)
        return not (filtered or self.has_penalties or self.logprobs is not None)


def _finite(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        bounds = f"{'(' if open_low else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} is {value}: it must be a finite number in {bounds}")


def _whole(name: str, value: int, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(
            f"{name} is {value}: it must be at least {low}"
            + (f", at most {high}" if high < math.inf else "")
        )
