"""The sampling options of one request, and those of a beam search."""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any, NoReturn

from nanovllm.checks import InvalidValue, checked, hints
from nanovllm.structured_params import StructuredOutputsParams

NO_SEED = -1
MAX_LOGPROBS = 100
ALL_LOGPROBS = -1
MAX_BIAS = 100.0
MAX_N = 16_384
MIN_TEMPERATURE = 1e-6
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


class RequestOutputKind(enum.Enum):
    """The outputs of `LLMEngine.step` for one request: all text so far, the new text, or one output
    at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2

    def __repr__(self) -> str:
        return str(self)  # an expression, for `SamplingParams.__repr__`


class Bias(dict[int, float]):
    """The value of `logit_bias`, checked once and then immutable."""

    def _refuse(self, *args: object, **options: object) -> NoReturn:
        raise TypeError("logit_bias cannot be changed in place: assign another dict")

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Bias, (dict(self),)


@dataclass(repr=False)
class SamplingParams:
    """How to choose the next token, and when to stop. Fields can be assigned; each assignment is
    checked, and a refused one changes nothing.

    temperature: logits are divided by it. 0 is greedy, and so is any value below 1e-6, where the
        quotients would overflow.
    min_p, top_k, top_p: filters, applied in this order. min_p keeps tokens with probability >=
        min_p times the largest; top_k keeps the k likeliest tokens (0 or -1: all); top_p keeps the
        smallest set of likeliest tokens with total probability >= top_p.
    repetition_penalty: for tokens in prompt or output, positive logits are divided by it and
        negative ones multiplied.
    presence_penalty, frequency_penalty: subtracted from logits of generated tokens, once per token
        and once per occurrence.
    seed: the same seed gives the same tokens in any batch. None, or -1, draws a seed from the
        engine's.
    max_tokens, min_tokens: limits on generated tokens. max_tokens None: up to max_model_len. The
        first min_tokens tokens are no stop tokens, and stop strings that end within them are text.
    stop: strings that end the text. The text does not include them, unless
        `include_stop_str_in_output`. None, "" and [] mean none.
    stop_token_ids: ids that end the text, as end-of-sequence ids do; token_ids includes them, the
        text does not, unless `include_stop_str_in_output`.
    ignore_eos: the model's end-of-sequence ids do not end the request.
    logprobs, prompt_logprobs: the number of likeliest tokens to report per position, beside the
        token itself: log-softmax of the model's logits, before bias, penalties and temperature. -1
        reports the whole vocabulary.
    n: the number of independent answers.
    logit_bias: numbers in [-100, 100] that are added to the logits of tokens, by token id.
    allowed_token_ids: the only tokens that may be generated. None: all.
    bad_words: texts that are not generated. The last token of a text is forbidden where the output
        ends with the tokens before it.
    detokenize: False leaves out the text of outputs.
    skip_special_tokens: the text leaves out special tokens.
    spaces_between_special_tokens: False removes the spaces that a tokenizer puts around special
        tokens that are not skipped.
    truncate_prompt_tokens: keep only the last tokens of a prompt, this many. -1: as many as
        max_model_len allows.
    output_kind: see `RequestOutputKind`.
    structured_outputs: the form that the answer must have. A dict of the fields is accepted.
    disable_spec_decode: the request takes no draft tokens. The answer is the same with them.

    The other fields exist in vLLM's class; only their defaults are supported.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 64
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    disable_spec_decode: bool = False

    best_of: object = None
    guided_decoding: object = None
    logits_processors: object = None
    extra_args: object = None
    flat_logprobs: object = False
    logprob_token_ids: object = None
    prompt_logprob_token_ids: object = None
    prompt_logprob_start: object = None
    repetition_detection: object = None
    thinking_token_budget: object = None
    skip_reading_prefix_cache: object = None
    stream_interval: object = None

    def __post_init__(self) -> None:
        self._check()

    def __setattr__(self, name: str, value: object) -> None:
        if name not in hints(SamplingParams):
            raise AttributeError(f"SamplingParams has no field {name!r}")
        if name not in self.__dict__:  # in __init__, which checks all fields at its end
            self.__dict__[name] = value
            return
        before = dict(self.__dict__)
        try:
            self.__dict__[name] = value
            self._check()
        except BaseException:
            self.__dict__.update(before)
            raise

    def __repr__(self) -> str:
        """A call that makes equal parameters, with the fields that differ from their defaults."""
        given = [(one.name, getattr(self, one.name), one.default) for one in fields(self)]
        told = [f"{name}={value!r}" for name, value, default in given if value != default]
        return f"SamplingParams({', '.join(told)})"

    def clone(self) -> SamplingParams:
        """A copy. Later changes to one do not affect the other: values of fields are immutable."""
        return copy.copy(self)

    def non_default(self, without: Collection[str] = ()) -> dict[str, Any]:
        """The fields that differ from their defaults, except `without`. They make equal
        parameters."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) is not field.default
            and field.name not in without
        }

    def of_answers(self) -> list[SamplingParams]:
        """The parameters of each of the n answers: n = 1, with seeds that follow on the first one.
        Only the first has prompt_logprobs: those of others would be equal."""
        if self.n == 1:
            return [self]
        num, seed = self.n, self.seed
        seeds: Sequence[int | None] = [None] * num if seed is None else _seeds(seed, num)
        first, *others = [replace(self, n=1, seed=seed) for seed in seeds]
        for one in others:
            one.prompt_logprobs = None
        return [first, *others]

    def _check(self) -> None:
        """Convert every field to its annotated type, and check it against its limits."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is field.default:
                continue
            hint = hints(SamplingParams)[field.name]
            if hint is object:
                _only_default(field, value)
            elif field.name == "structured_outputs" and isinstance(value, Mapping):
                self.__dict__[field.name] = StructuredOutputsParams.of(value)
            elif field.name == "logit_bias" and isinstance(value, Mapping):
                self.__dict__[field.name] = Bias(checked(field.name, _numbered(value), hint))
            else:
                self.__dict__[field.name] = checked(field.name, value, hint)
        self._check_limits()
        self._check_lists()
        if self.temperature < MIN_TEMPERATURE:
            self.__dict__["temperature"] = 0.0
        if self.top_k == -1:
            self.__dict__["top_k"] = 0
        if self.seed == NO_SEED:
            self.__dict__["seed"] = None

    def _check_limits(self) -> None:
        _within("temperature", self.temperature, 0.0, math.inf)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _at_least("top_k", self.top_k, -1, INT32_MAX)
        _at_least("max_tokens", self.max_tokens, 1)
        _at_least("min_tokens", self.min_tokens, 0, self.max_tokens)
        _at_least("n", self.n, 1, MAX_N)
        _at_least("seed", self.seed, -INT64_MAX - 1, INT64_MAX)
        _at_least("logprobs", self.logprobs, ALL_LOGPROBS, MAX_LOGPROBS)
        _at_least("prompt_logprobs", self.prompt_logprobs, ALL_LOGPROBS, MAX_LOGPROBS)
        _at_least("truncate_prompt_tokens", self.truncate_prompt_tokens, -1)
        if self.truncate_prompt_tokens == 0:
            words = "truncate_prompt_tokens is 0: it must be at least 1, or -1"
            raise InvalidValue("truncate_prompt_tokens", words)

    def _check_lists(self) -> None:
        stop = self.stop
        self.__dict__["stop"] = stops = (stop,) if isinstance(stop, str) and stop else stop or ()
        if "" in stops:
            raise InvalidValue("stop", f"stop must hold non-empty strings, not {stop!r}")
        self.__dict__["stop_token_ids"] = self.stop_token_ids or ()
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                _at_least(name, token_id, 0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            words = "allowed_token_ids is empty: no token could be generated"
            raise InvalidValue("allowed_token_ids", words)
        for token_id, bias in (self.logit_bias or {}).items():
            _at_least("logit_bias", token_id, 0)
            _within("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
        if any(not word.strip() for word in self.bad_words or ()):
            raise InvalidValue("bad_words", f"bad_words must hold words, not {self.bad_words!r}")
        if self.stop_strings and not self.detokenize:
            raise InvalidValue("stop", f"stop={list(self.stop_strings)} needs detokenize=True")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    def stop_ids(self, eos_ids: Collection[int]) -> frozenset[int]:
        """The tokens that end an answer. eos_ids: the model's end-of-sequence ids."""
        return frozenset((*(self.stop_token_ids or ()), *(() if self.ignore_eos else eos_ids)))

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def has_edits(self) -> bool:
        return bool(self.logit_bias or self.bad_words or self.allowed_token_ids)

    @property
    def is_plain(self) -> bool:
        """True if only the temperature matters: the sampler in the step's graph is enough."""
        filtered = self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)
        edited = self.has_penalties or self.has_edits
        return not (filtered or edited or self.logprobs is not None)

    @property
    def is_structured(self) -> bool:
        return self.structured_outputs is not None


@dataclass
class BeamSearchParams:
    """Options of `LLM.beam_search`.

    beam_width: the number of sequences kept after each token, and returned.
    max_tokens: the most generated tokens.
    ignore_eos: end-of-sequence ids do not end a sequence.
    temperature: logits are divided by it before log-probabilities are taken; only 0 and 1, which
        leave them unchanged, are supported.
    length_penalty: a sequence's score is its total log-probability divided by its length to this
        power.
    include_stop_str_in_output: vLLM's field. `LLM.beam_search` does not read it there nor here: its
        sequences include the end-of-sequence token.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            hint = hints(BeamSearchParams)[field.name]
            setattr(self, field.name, checked(field.name, getattr(self, field.name), hint))
        # each step requests 2 * beam_width log-probabilities
        _at_least("beam_width", self.beam_width, 1, MAX_LOGPROBS // 2)
        _at_least("max_tokens", self.max_tokens, 1)
        _within("length_penalty", self.length_penalty, -10.0, 10.0)
        if self.temperature not in (0.0, 1.0):
            words = f"temperature is {self.temperature}: a beam search takes 0 or 1 only"
            raise InvalidValue("temperature", words)


def _only_default(field: Field[Any], value: object) -> None:
    if value != field.default:
        raise InvalidValue(
            field.name,
            f"{field.name} is {value!r}: only {field.default!r} is supported, since "
            f"{field.name} is not implemented",
        )


def _seeds(first: int, num: int) -> list[int]:
    """first, first + 1, …, which wrap around at 64 bits and leave out NO_SEED."""
    found = [(first + i + INT64_MAX + 1) % (1 << 64) - INT64_MAX - 1 for i in range(num + 1)]
    return [seed for seed in found if seed != NO_SEED][:num]


def _numbered(bias: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same with numbers as keys: in JSON, token ids are keys like "123"."""
    return {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in bias.items()}


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        bounds = f"{'(' if open_low else '['}{low:g}, {high:g}]"
        raise InvalidValue(name, f"{name} is {value}: it must be a finite number in {bounds}")


def _at_least(name: str, value: int | None, low: int, high: int | None = None) -> None:
    if value is not None and not low <= value <= (math.inf if high is None else high):
        upper = "" if high is None else f", at most {high}"
        raise InvalidValue(name, f"{name} is {value}: it must be at least {low}{upper}")
