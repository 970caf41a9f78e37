"""Builds `SamplingParams` from a request's fields, within the server's limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields, replace
from typing import Any

from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import invalid, refused
from nanovllm.api.schemas import ChatBody, CompletionBody, ResponsesBody, Sampling
from nanovllm.api.structured import structured_outputs
from nanovllm.sampling import INT32_MAX, RequestOutputKind, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
# fields of SamplingParams that are converted
CHANGED = ("max_tokens", "min_tokens", "structured_outputs")
SAME = tuple(
    field.name
    for field in fields(SamplingParams)
    if field.name in Sampling.__struct_fields__ and field.name not in CHANGED
)
LISTS_OF_TOKENS = ("logit_bias", "allowed_token_ids", "stop_token_ids", "bad_words")


class ParamsMaker:
    """Builds the sampling parameters of requests. Methods raise ValueError or ApiError."""

    def __init__(self, config: ServerConfig, default: SamplingParams, max_model_len: int) -> None:
        self._config, self._default, self._max_len = config, default, max_model_len

    def of_completion(self, body: CompletionBody) -> SamplingParams:
        self._check(body)
        given = self._given(body)
        wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if wanted == 0 and body.echo:
            wanted = 1  # prompt only: the engine generates at least one token
        given["max_tokens"] = self._tokens("max_tokens", wanted)
        if body.logprobs is not None:
            given["logprobs"] = self._num_logprobs("logprobs", body.logprobs)
            if body.echo:
                given["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
        if body.stream and (body.prompt_logprobs is not None or "prompt_logprobs" in given):
            name = "echo" if body.prompt_logprobs is None else "prompt_logprobs"
            raise refused(name, f"{name} with log-probabilities of the prompt needs stream=false")
        return self._made(given, is_stream=bool(body.stream))

    def of_chat(self, body: ChatBody) -> SamplingParams:
        self._check(body)
        given = self._given(body)
        wanted = body.max_completion_tokens
        if wanted is not None and body.max_tokens not in (None, wanted):
            words = "max_tokens and max_completion_tokens differ: give one of them"
            raise invalid("max_tokens", words)
        name = "max_tokens" if wanted is None else "max_completion_tokens"
        given["max_tokens"] = self._tokens(name, body.max_tokens if wanted is None else wanted)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs=true")
        if body.logprobs:
            given["logprobs"] = self._num_logprobs("top_logprobs", body.top_logprobs or 0)
        if body.stream and body.prompt_logprobs is not None:
            raise refused("prompt_logprobs", "prompt_logprobs needs stream=false")
        return self._made(given, is_stream=bool(body.stream))

    def of_response(self, body: ResponsesBody) -> SamplingParams:
        given: dict[str, Any] = {
            "max_tokens": self._tokens("max_output_tokens", body.max_output_tokens)
        }
        for name in ("temperature", "top_p"):
            if (value := getattr(body, name)) is not None:
                given[name] = value
        outputs = structured_outputs(body)
        if outputs is not None:
            given["structured_outputs"] = outputs
        return self._made(given, is_stream=bool(body.stream))

    def _made(self, given: dict[str, Any], *, is_stream: bool) -> SamplingParams:
        kind = RequestOutputKind.DELTA if is_stream else RequestOutputKind.FINAL_ONLY
        return replace(self._default, output_kind=kind, **given)

    def _given(self, body: Sampling) -> dict[str, Any]:
        given = {
            name: value for name in SAME if (value := getattr(body, name)) is not None
        }  # fmt: skip
        if body.min_tokens is not None:
            given["min_tokens"] = self._tokens("min_tokens", body.min_tokens, 0)
        outputs = structured_outputs(body)
        if outputs is not None:
            given["structured_outputs"] = outputs
        return given

    def _tokens(self, name: str, wanted: int | None, least: int = 1) -> int | None:
        """A token limit, capped at the model's maximum length."""
        if wanted is not None and wanted < least:
            raise invalid(name, f"{name} is {wanted}: it must be at least {least}")
        return None if wanted is None else min(wanted, self._max_len)

    def _num_logprobs(self, name: str, value: int) -> int:
        """Log-probabilities per token. -1 (the whole vocabulary) is refused."""
        return _limited(name, value, 0, self._config.max_logprobs)

    def check_prompt_logprobs(self, params: SamplingParams, num_tokens: int) -> None:
        """Refuse more log-probabilities of prompts with so many tokens than a response may have:
        each answer of a completion repeats them."""
        if params.prompt_logprobs is None:
            return
        each, most = params.prompt_logprobs + 1, self._config.max_prompt_logprobs
        if (num := num_tokens * each * params.n) > most:
            words = (
                f"{num_tokens} prompt tokens with {each} log-probabilities each and n={params.n} "
                f"are {num} log-probabilities: at most {most} per request are allowed"
            )
            raise invalid("prompt_logprobs", words)

    def check_answer_logprobs(self, params: SamplingParams, prompt_lens: Sequence[int]) -> None:
        """Refuse more log-probabilities of answers than a request may have. A single answer may
        have as many as fit in the context."""
        if params.logprobs is None or params.n * len(prompt_lens) == 1:
            return
        left = [max(1, self._max_len - num) for num in prompt_lens]
        num_tokens = sum(left if params.max_tokens is None else [
            min(params.max_tokens, num) for num in left
        ])  # fmt: skip
        each, most = params.logprobs + 1, self._config.max_answer_logprobs
        if (num := num_tokens * each * params.n) > most:
            words = (
                f"up to {num_tokens} tokens with {each} log-probabilities each and n={params.n} "
                f"are {num} log-probabilities: at most {most} per request are allowed, so ask for "
                "fewer tokens (max_tokens)"
            )
            raise invalid("logprobs", words)

    def _check(self, body: Sampling) -> None:
        """Refuse values beyond the limits of one request."""
        config = self._config
        if body.n is not None:
            _limited("n", body.n, 1, config.max_n)
        if body.prompt_logprobs is not None:
            self._num_logprobs("prompt_logprobs", body.prompt_logprobs)
        _limited("priority", body.priority or 0, -INT32_MAX, INT32_MAX)
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", "stream_options needs stream=true")
        if body.stop is not None:
            stops = [body.stop] if isinstance(body.stop, str) else body.stop
            _at_most("stop", "strings", stops, config.max_stop_strings)
            _at_most("stop", "characters", "".join(stops), config.max_stop_chars)
        for name in LISTS_OF_TOKENS:
            _at_most(name, "entries", getattr(body, name) or (), config.max_bias)
        _at_most("bad_words", "characters", "".join(body.bad_words or ()), config.max_stop_chars)
        for name in ("allowed_token_ids", "stop_token_ids"):
            for token_id in getattr(body, name) or ():
                _limited(name, token_id, 0, INT32_MAX)
        _check_bias(body.logit_bias)


def _check_bias(bias: Mapping[str, float] | None) -> None:
    for key in bias or ():
        if not (key.isascii() and key.isdecimal() and len(key) <= 9):
            words = f"logit_bias has the key {key[:32]!r}: it must be a token id"
            raise invalid("logit_bias", words)


def _limited(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise invalid(name, f"{name} is {value}: it must be at least {low}, at most {high}")
    return value


def _at_most(name: str, unit: str, values: Sized, most: int) -> None:
    if len(values) > most:
        raise invalid(name, f"{name} has {len(values)} {unit}: at most {most} are allowed")
