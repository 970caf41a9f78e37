"""Sampling parameters: which values are refused, and with which messages."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from nanovllm import SamplingParams

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        (
            "temperature",
            [NAN, INF, -INF, -0.1, -1],
            r"temperature is .*: it must be a finite number in \[0, inf\]",
        ),
        (
            "top_p",
            [NAN, INF, 0, 0.0, -1, 1.01],
            r"top_p is .*: it must be a finite number in \(0, 1\]",
        ),
        ("min_p", [NAN, INF, -0.1, 1.01], r"min_p is .*: it must be a finite number in \[0, 1\]"),
        (
            "repetition_penalty",
            [NAN, INF, 0, -1.0],
            r"repetition_penalty is .*finite number in \(0, inf\]",
        ),
        (
            "presence_penalty",
            [NAN, 2.1, -2.1, INF],
            r"presence_penalty is .*finite number in \[-2, 2\]",
        ),
        (
            "frequency_penalty",
            [NAN, 2.1, -2.1, INF],
            r"frequency_penalty is .*finite number in \[-2, 2\]",
        ),
        ("top_k", [-2, 2**31, 10**400], "top_k is .*: it must be at least -1"),
        ("max_tokens", [0, -1], "max_tokens is .*: it must be at least 1"),
        ("min_tokens", [-1, 65], "min_tokens is .*: it must be at least 0, at most 64"),
        ("n", [0, -3], "n is .*: it must be at least 1"),
        (
            "seed",
            [2**63, -(2**63) - 1],
            "seed is .*: it must be at least -9223372036854775808, at most",
        ),
        ("logprobs", [-1, 101], "logprobs is .*: it must be at least 0, at most 100"),
        ("prompt_logprobs", [-1, 101], "prompt_logprobs is .*at most 100"),
        ("stop_token_ids", [[-1]], "stop_token_ids is -1"),
    ],
)
def test_values_out_of_range_are_refused_by_name_value_and_limit(
    name: str, values: list[Any], match: str
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=match):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"]
)
@pytest.mark.parametrize("value", ["1", None, True, [1.0]])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number, not"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name", ["top_k", "max_tokens", "min_tokens", "n", "seed", "logprobs", "prompt_logprobs"]
)
@pytest.mark.parametrize("value", ["1", 1.0, True, [1]])
def test_what_is_no_whole_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number, not"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [1], [None]])
def test_stop_strings_must_be_non_empty_strings(stop: Any) -> None:
    if stop == "":
        with pytest.raises(ValueError, match="stop must hold non-empty strings, not ''"):
            SamplingParams(stop=stop)
    else:
        with pytest.raises(ValueError, match="stop must hold non-empty strings"):
            SamplingParams(stop=stop)


@pytest.mark.parametrize("value", [5, 5.0, True])
def test_what_is_no_list_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"stop must hold non-empty strings, not"):
        SamplingParams(stop=value)
    with pytest.raises(ValueError, match=r"stop_token_ids must be a list of token ids, not"):
        SamplingParams(stop_token_ids=value)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0)  # type: ignore[call-arg]


def test_they_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0  # type: ignore[misc]


def test_edges_of_every_range_are_allowed() -> None:
    SamplingParams(
        temperature=0,
        top_k=-1,
        top_p=1,
        min_p=1,
        seed=-(2**63),
        max_tokens=1,
        min_tokens=1,
        logprobs=0,
    )
    SamplingParams(
        temperature=1e300,
        top_p=1e-300,
        min_p=0,
        seed=2**63 - 1,
        max_tokens=10**9,
        logprobs=100,
        n=100,
    )
    SamplingParams(
        presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-5, prompt_logprobs=0
    )


def test_stop_is_one_string_or_several() -> None:
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")
    assert SamplingParams().stop_strings == () == SamplingParams(stop=[]).stop_strings


def test_top_k_minus_one_is_off_and_tiny_temperatures_are_greedy() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(temperature=1e-40) == SamplingParams(temperature=0)


def test_plain_is_what_the_sampler_in_the_graph_can_do() -> None:
    plain: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1},
    ]
    plain += [{"seed": 1, "stop": "x", "max_tokens": 3}, {"top_k": -1}, {"prompt_logprobs": 3}]
    beyond: list[dict[str, Any]] = [
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
    ]
    beyond += [{"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"logprobs": 0}]
    assert all(SamplingParams(**fields).is_plain for fields in plain)
    assert not any(SamplingParams(**fields).is_plain for fields in beyond)
