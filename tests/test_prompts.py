"""Prompts of every form come down to a text or token ids; others are refused by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import TextPrompt, TokensPrompt
from nanovllm.prompts import Prompt, as_prompt, prompt_list

IDS = [5, 6, 7]


@pytest.mark.parametrize(
    "given",
    [
        IDS, tuple(IDS), range(5, 8), np.array(IDS), np.array(IDS, np.int32), torch.tensor(IDS),
        (i for i in IDS), [np.int64(5), torch.tensor(6), 7], {"prompt_token_ids": np.array(IDS)},
        TokensPrompt(prompt_token_ids=IDS),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_token_ids_in_every_form_are_one_prompt(given: Any) -> None:
    (prompt,) = prompt_list(given)
    assert prompt == Prompt(None, IDS)


@pytest.mark.parametrize("given", ["text", {"prompt": "text"}, TextPrompt(prompt="text")])
def test_text_in_every_form_is_one_prompt(given: Any) -> None:
    assert prompt_list(given) == [Prompt("text", None)]


@pytest.mark.parametrize(
    "given",
    [
        ["a", IDS, {"prompt": "b"}], ("a", tuple(IDS), TextPrompt(prompt="b")),
        (one for one in ("a", IDS, {"prompt": "b"})), ["a", (i for i in IDS), {"prompt": "b"}],
    ],
    ids=["list", "tuple", "generator", "nested generator"],
)  # fmt: skip
def test_any_iterable_of_prompts_is_several(given: Any) -> None:
    assert prompt_list(given) == [Prompt("a", None), Prompt(None, IDS), Prompt("b", None)]


def test_arrays_of_two_dimensions_are_several_prompts() -> None:
    for given in (np.array([IDS, IDS]), torch.tensor([IDS, IDS]), [np.array(IDS)] * 2):
        assert prompt_list(given) == [Prompt(None, IDS)] * 2


def test_token_ids_beside_texts() -> None:
    assert prompt_list(None, IDS) == [Prompt(None, IDS)] == prompt_list(None, [IDS])
    assert prompt_list(["a", "b"], [IDS, [8]]) == [Prompt("a", IDS), Prompt("b", [8])]
    with pytest.raises(ValueError, match="1 prompts and 2 prompt_token_ids"):
        prompt_list("a", [IDS, IDS])


def test_a_cache_salt_comes_along() -> None:
    assert as_prompt({"prompt": "a", "cache_salt": "x"}).cache_salt == "x"
    assert as_prompt({"prompt_token_ids": IDS, "multi_modal_data": None}) == Prompt(None, IDS)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (None, "the prompt is None: it must be text or a list of token ids"),
        (5, "the prompt is 5"),
        (object, "the prompt is <class 'object'>"),
        ({}, r"the prompt is \{\}: it has no 'prompt'"),
        ({"text": "a"}, "the prompt has the key 'text', which is not supported"),
        ({"prompt": 5}, "the prompt is 5: the value of 'prompt' must be text"),
        ({"prompt_token_ids": "5"}, "prompt_token_ids is '5'"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "image 1 is of type int"),
        ({"prompt": "a", "mm_processor_kwargs": {"x": 1}}, "the key 'mm_processor_kwargs'"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt is 5: it must be text"),
        ("half \ud83d", r"has '\\ud83d' at position 5"),
        ({"prompt": "\udc00"}, "at position 0: half of a surrogate pair"),
        (np.array(5), r"the prompt has shape \[\]: token ids have one dimension"),
        (b"text", "the prompt is b'text': it must be text or a list of token ids"),
        ([bytearray(b"text")], "the prompt is bytearray"),
        ({"prompt": "a", "cache_salt": "\ud83d"}, r"cache_salt has '\\ud83d' at position 0"),
        ([np.ones((2, 2), int)], r"the prompt has shape \[2, 2\]"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_other_things_are_refused_by_value(given: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        prompt_list(given)


@pytest.mark.parametrize("given", ["text", ["text"], [{"prompt": "text"}]])
def test_texts_are_no_token_ids(given: Any) -> None:
    with pytest.raises(
        ValueError, match=r"prompt_token_ids is .*text.*: it must be lists of token"
    ):
        prompt_list(None, given)
