"""Sampling parameters: which values are refused, and with which messages."""

from __future__ import annotations

import copy
import json
import math
import operator
import pickle
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.sampling import RequestOutputKind
from nanovllm.structured_params import StructuredOutputsParams

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
        ("logprobs", [-2, 101], "logprobs is .*: it must be at least -1, at most 100"),
        ("prompt_logprobs", [-2, 101], "prompt_logprobs is .*at most 100"),
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
    with pytest.raises(ValueError, match=f"{name} is .*: it must be a number"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name", ["top_k", "max_tokens", "min_tokens", "n", "seed", "logprobs", "prompt_logprobs"]
)
@pytest.mark.parametrize("value", ["1", 1.0, True, [1]])
def test_what_is_no_whole_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*: it must be a whole number"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("stop", [[""], ["a", ""]])
def test_stop_strings_must_be_non_empty(stop: Any) -> None:
    with pytest.raises(ValueError, match="stop must hold non-empty strings"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("value", [5, 5.0, True, [1], [None]])
def test_stop_strings_must_be_text(value: Any) -> None:
    with pytest.raises(ValueError, match=r"stop is .*: it must be text"):
        SamplingParams(stop=value)


@pytest.mark.parametrize("value", [5, 5.0, True, "5", ["5"], [1.0]])
@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids_must_be_a_list_of_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*: it must be a (list|whole number)"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name",
    [
        "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize",
        "disable_spec_decode",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["False", 0, None])
def test_switches_must_be_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}: it must be True or False"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"logit_bias": {5: 101}}, r"logit_bias is 101.0: .* finite number in \[-100, 100"),
        ({"logit_bias": {-5: 1}}, "logit_bias is -5: it must be at least 0"),
        ({"logit_bias": {"a": 1}}, "logit_bias is {'a': 1}: it must be a whole number"),
        ({"logit_bias": [5]}, r"logit_bias is \[5\]: it must be a dict or None"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty: no token could be generated"),
        ({"bad_words": ["a", " "]}, "bad_words must hold words, not"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0: it must be at least 1"),
        ({"stop": "x", "detokenize": False}, r"stop=\['x'\] needs detokenize=True"),
        ({"n": 16_385}, "n is 16385: it must be at least 1, at most 16384"),
        ({"flat_logprobs": True}, "flat_logprobs is True: only False is supported"),
        ({"structured_outputs": "a"}, "structured_outputs is 'a': it must be"),
        ({"structured_outputs": {}}, "structured_outputs has nothing: exactly one of json"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "has regex, json_object: ex"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs has no field 'regexp'"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice is 'a': it must be"),
        ({"structured_outputs": {"choice": []}}, "choice is empty: no output is possible"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "whitespace_pattern is set with regex: it is only for JSON",
        ),
        (
            {"structured_outputs": {"json": {}, "structural_tag": "{}"}},
            "structured_outputs.structural_tag is '{}': only None is supported",
        ),
        ({"guided_decoding": {"regex": "a"}}, "guided_decoding is .*: only None"),
        ({"temperature": 10**400}, "temperature is .*: it must be a number within"),
    ],
)
def test_other_mistakes_name_field_and_value(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SamplingParams(**fields)


def test_numpy_and_torch_scalars_are_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(3), top_p=torch.tensor(0.25),
        max_tokens=torch.tensor(7), ignore_eos=np.bool_(True), stop_token_ids=np.array([5, 6]),
        logit_bias={np.int32(4): np.float64(1.5), "9": 2},
    )  # fmt: skip
    assert params == SamplingParams(
        temperature=0.5, top_k=3, top_p=0.25, max_tokens=7, ignore_eos=True, stop_token_ids=[5, 6],
        logit_bias={4: 1.5, 9: 2.0},
    )  # fmt: skip
    assert type(params.temperature) is float and type(params.top_k) is int


def test_none_and_empty_text_mean_no_limit_and_no_strings() -> None:
    params = SamplingParams(max_tokens=None, stop_token_ids=None, stop="")
    assert params.max_tokens is None and params.stop_token_ids == () == params.stop_strings


def test_assignments_are_checked_and_a_refused_one_changes_nothing() -> None:
    params = SamplingParams(temperature=0.5)
    params.max_tokens, params.stop, params.temperature = 9, "x", np.float32(0.25)
    assert params == SamplingParams(temperature=0.25, max_tokens=9, stop=["x"])
    for name, value in {"max_tokens": 0, "temperature": "hot", "stop": [""]}.items():
        before = params.clone()
        with pytest.raises(ValueError, match=name):
            setattr(params, name, value)
        assert params == before
    with pytest.raises(AttributeError, match="has no field 'temprature'"):
        params.temprature = 1  # type: ignore[attr-defined]


def test_a_clone_is_independent() -> None:
    params = SamplingParams(max_tokens=5)
    clone = params.clone()
    clone.max_tokens = 6
    assert (params.max_tokens, clone.max_tokens) == (5, 6)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0)  # type: ignore[call-arg]


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
    beyond += [{"logit_bias": {1: 1}}, {"allowed_token_ids": [1]}, {"bad_words": ["a"]}]
    assert all(SamplingParams(**fields).is_plain for fields in plain)
    assert not any(SamplingParams(**fields).is_plain for fields in beyond)


def test_no_change_of_a_bias_goes_unchecked_or_reaches_a_copy() -> None:
    given = {5: 1.0}
    params = SamplingParams(logit_bias=given)
    given[5] = 1e9
    assert params.logit_bias == {5: 1.0}
    bias: Any = params.logit_bias
    for change in (
        lambda: bias.update({5: 1e9}),
        lambda: bias.__setitem__(5, 1e9),
        lambda: bias.pop(5),
        lambda: bias.setdefault(6, 1e9),
        lambda: operator.ior(bias, {5: 1e9}),
        bias.clear,
        bias.popitem,
    ):
        with pytest.raises(TypeError, match="assign another dict"):
            change()
    copies = [copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))]
    for other in [params.clone(), *copies]:
        assert other == params
        other.logit_bias = {5: 2.0}
    assert params.logit_bias == {5: 1.0}
    assert json.loads(json.dumps(params.logit_bias)) == {"5": 1.0}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params.logit_bias)) == {5: 1.0}


def test_seeds_of_several_answers_wrap() -> None:
    seeds = [one.seed for one in SamplingParams(n=3, seed=2**63 - 2).of_answers()]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]


def test_a_seed_of_minus_1_is_no_seed_and_is_left_out_of_seeds_that_follow() -> None:
    assert SamplingParams(seed=-1) == SamplingParams()
    assert [one.seed for one in SamplingParams(n=2, seed=-1).of_answers()] == [None, None]
    params = SamplingParams(n=4, seed=-3)
    assert [one.seed for one in params.of_answers()] == [-3, -2, 0, 1]
    params.seed = -1
    assert params.seed is None


def test_the_first_of_several_answers_has_the_log_probabilities_of_the_prompt() -> None:
    params = SamplingParams(n=3, prompt_logprobs=2, logprobs=1)
    assert [one.prompt_logprobs for one in params.of_answers()] == [2, None, None]
    assert {one.logprobs for one in params.of_answers()} == {1}


@pytest.mark.parametrize(
    "given",
    [{}, {"temperature": 0.5, "stop": ["a", "b"], "n": 3, "seed": -2},
     {"logit_bias": {3: 1.5}, "output_kind": RequestOutputKind.DELTA, "max_tokens": None},
     {"structured_outputs": {"json": {"type": "object"}}, "allowed_token_ids": [1, 2]}],
)  # fmt: skip
def test_the_text_of_parameters_makes_them_again(given: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    names = {one.__name__: one for one in (
        SamplingParams, RequestOutputKind, StructuredOutputsParams
    )}  # fmt: skip
    again = eval(repr(params), names)
    assert again == params and again.output_kind is params.output_kind


def test_the_attributes_are_the_fields() -> None:
    params = SamplingParams(temperature=0.5, stop="a")
    assert SamplingParams(**vars(params)) == params
