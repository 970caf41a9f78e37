"""The option `speculative_config`: what proposes tokens, and how many. The names are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, NamedTuple

from nanovllm.checks import InvalidValue, Rule, check_fields, one_of, whole

OPTION = "speculative_config"
MAX_TOKENS, MAX_NGRAM = 64, 64
DEFAULT_NGRAM = 5
DEFAULT_DEPTH, DEFAULT_PAST, MAX_PAST = 24, 1 << 16, 1 << 22  # of "suffix"
LENGTHS = (1, 3, 7, 15, 31)  # numbers of draft tokens below the largest


class Method(NamedTuple):
    """A method of drafting: the keys that it `needs`, and others that it `takes`."""

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


# `startup/speculation.py` has the function that makes each method's proposer.
METHODS: dict[str, Method] = {
    "draft_model": Method(needs=("model", "num_speculative_tokens")),
    "eagle3": Method(("model", "num_speculative_tokens"), ("quantization",)),
    "dflash": Method(needs=("model", "num_speculative_tokens")),
    "mtp": Method(needs=("num_speculative_tokens",)),
    "ngram": Method(("num_speculative_tokens",), ("prompt_lookup_min", "prompt_lookup_max")),
    "suffix": Method(
        ("num_speculative_tokens",),
        ("suffix_decoding_max_tree_depth", "suffix_decoding_max_cached_tokens"),
    ),
}

ALLOWED: dict[str, Rule] = {
    "model": ("a folder or a Hub id", lambda value: str(value) != ""),
    "num_speculative_tokens": whole(1, MAX_TOKENS),
    "quantization": one_of("int8", "fp8", "int4", None),
    "prompt_lookup_min": whole(1, MAX_NGRAM),
    "prompt_lookup_max": whole(1, MAX_NGRAM),
    "suffix_decoding_max_tree_depth": whole(1, MAX_NGRAM),
    "suffix_decoding_max_cached_tokens": whole(0, MAX_PAST),
    "rejection_sample_method": one_of("strict", "standard", "synthetic", None),
    "synthetic_acceptance_length": ("a number of at least 1", lambda value: value >= 1),
}
# Keys of every method.
OF_ALL = ("rejection_sample_method", "synthetic_acceptance_length")


@dataclass(frozen=True)
class SpeculativeConfig:
    """What proposes draft tokens on the device. Steps verify them, so they never change answers.

    method: "draft_model" (a smaller model), "ngram" (what followed the same tokens before),
        "suffix" (in earlier answers, too), "eagle3" or "dflash" (heads on hidden states) or "mtp"
        (the checkpoint's own). None: "draft_model".
    model: the checkpoint that drafts: a folder or a Hub id. It needs the model's vocabulary.
    num_speculative_tokens: the draft tokens of each row in a step.
    quantization: converts the weights of an "eagle3" head as they are read, as the engine's option
        of this name does those of the model. None: they keep the model's dtype.
    prompt_lookup_min, prompt_lookup_max: how many of a row's last tokens "ngram" looks for in the
        tokens before them: the longest that occur. Without one of them it is the other, without
        both they are 5, as in vLLM.
    suffix_decoding_max_tree_depth: the most of a row's last tokens that "suffix" looks for, in the
        tokens before them and in earlier answers. None: 24, as in vLLM.
    suffix_decoding_max_cached_tokens: the tokens of earlier answers that "suffix" has on the
        device, the latest ones. None: 65,536.
    rejection_sample_method: None, "strict" or "standard" (the names of older and newer vLLM) keeps
        the drafts that the model chooses. "synthetic"
        is for benchmarks with random weights: it keeps drafts at random, so answers are
        meaningless.
    synthetic_acceptance_length: the mean number of tokens of a row in a step with
        num_speculative_tokens drafts, for "synthetic": 1 to num_speculative_tokens + 1.
    """

    method: str | None = None
    model: str | PathLike[str] | None = None
    num_speculative_tokens: int | None = None
    quantization: str | None = None
    prompt_lookup_min: int | None = None
    prompt_lookup_max: int | None = None
    suffix_decoding_max_tree_depth: int | None = None
    suffix_decoding_max_cached_tokens: int | None = None
    rejection_sample_method: str | None = None
    synthetic_acceptance_length: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SpeculativeConfig:
        """The checked values. Raises InvalidValue, also for unknown keys."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise InvalidValue(
                OPTION, f"{OPTION} has {', '.join(unknown)}: the keys are {', '.join(known)}"
            )
        try:
            return cls(**given)
        except InvalidValue as error:
            raise InvalidValue(OPTION, f"{OPTION}: {error}") from None

    def __post_init__(self) -> None:
        if self.method is None and self.model is not None:
            object.__setattr__(self, "method", "draft_model")
        if self.method not in METHODS:
            raise InvalidValue(
                "method", f"method is {self.method!r}: it must be one of {', '.join(METHODS)}"
            )
        check_fields(self, ALLOWED)
        method = METHODS[self.method]
        for name in (field.name for field in fields(self) if field.name != "method"):
            value = getattr(self, name)
            if value is None and name in method.needs:
                raise InvalidValue(name, f"method {self.method!r} needs {name}")
            if value is not None and name not in method.needs + method.takes + OF_ALL:
                raise InvalidValue(
                    name, f"{name} is {value!r}, which method {self.method!r} does not take"
                )
        self._check_synthetic()
        shortest, longest = self.ngram_lengths
        if shortest > longest:
            raise InvalidValue(
                "prompt_lookup_min",
                f"prompt_lookup_min is {shortest}: it must be at most prompt_lookup_max "
                f"({longest})",
            )

    def _check_synthetic(self) -> None:
        mean, name = self.synthetic_acceptance_length, "synthetic_acceptance_length"
        if (mean is not None) != (self.rejection_sample_method == "synthetic"):
            raise InvalidValue(
                name,
                f"{name} is {mean} and rejection_sample_method "
                f"{self.rejection_sample_method!r}: 'synthetic' and a length need each other",
            )
        if mean is not None and mean > 1 + self.draft_lengths(adapts=False)[-1]:
            raise InvalidValue(
                name,
                f"{name} is {mean}: it must be at most num_speculative_tokens + 1 "
                f"({1 + self.draft_lengths(adapts=False)[-1]})",
            )

    @property
    def synthetic_rate(self) -> float | None:
        """The share a of accepted tokens at each position with 1 + a + a² + … =
        synthetic_acceptance_length; None without it."""
        mean = self.synthetic_acceptance_length
        if mean is None:
            return None
        low, high = 0.0, 1.0
        for _ in range(50):
            rate = (low + high) / 2
            made = sum(rate**num for num in range(1 + self.draft_lengths(adapts=False)[-1]))
            low, high = (rate, high) if made < mean else (low, rate)
        return high

    @property
    def given(self) -> dict[str, Any]:
        """The values that are set, as JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def ngram_lengths(self) -> tuple[int, int]:
        """The least and the most tokens that "ngram" looks for."""
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        return low or high or DEFAULT_NGRAM, high or low or DEFAULT_NGRAM

    @property
    def suffix_sizes(self) -> tuple[int, int]:
        """The most tokens that "suffix" looks for, and the tokens of earlier answers."""
        depth, num_past = (
            self.suffix_decoding_max_tree_depth, self.suffix_decoding_max_cached_tokens
        )  # fmt: skip
        return depth or DEFAULT_DEPTH, DEFAULT_PAST if num_past is None else num_past

    def draft_lengths(self, *, adapts: bool) -> tuple[int, ...]:
        """The numbers of draft tokens that a step can verify per row, ascending: the largest alone,
        or those of LENGTHS below it too if the number `adapts`."""
        most = self.num_speculative_tokens
        assert most is not None
        return (*(length for length in LENGTHS if adapts and length < most), most)
