"""Captured steps on a GPU draft, verify and accept as plain decoding chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.structured import matcher
from nanovllm.structured_params import StructuredOutputsParams
from tests.conftest import save_tiny
from tests.engines import assert_one_distribution, greedy, random_prompts, save_tokenizer, tokens
from tests.runner.heads import EagleCase
from tests.runner.mtp_cases import CASES
from tests.runner.test_dflash import save as save_dflash
from tests.runner.test_dflash import save_speculators

pytestmark = pytest.mark.gpu

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["first_name", "occupation"],
    "properties": {
        "first_name": {"enum": ["ab", "abc", "b"]}, "occupation": {"enum": ["reader", "writer"]},
    },
}  # fmt: skip
NUM = 4
VOCAB = 99  # of the checkpoint with a layer that proposes
SIZES: dict[str, Any] = {
    "device": "cuda", "dtype": "float32", "max_num_seqs": 5, "max_num_batched_tokens": 32,
    "max_model_len": 256, "kvcache_block_size": 16, "num_kvcache_blocks": 100,
    "graph_batch_sizes": (5,),
}  # fmt: skip
PROMPTS = [
    [one % VOCAB for one in prompt]
    for prompt in [*random_prompts([19, 1, 40, 99], seed=3), random_prompts([7], seed=4)[0] * 5]
]
PARAMS = {
    "greedy": greedy(25),
    "drawn": SamplingParams(temperature=0.9, seed=4, max_tokens=25, ignore_eos=True),
    "top-p": SamplingParams(temperature=0.9, top_p=0.9, seed=4, max_tokens=25, ignore_eos=True),
}
METHODS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "ngram": lambda target, folder: {"prompt_lookup_min": 1, "prompt_lookup_max": 3},
    "suffix": lambda target, folder: {"suffix_decoding_max_cached_tokens": 999},
    "draft_model": lambda target, folder: {"model": str(target)},
    "eagle3": lambda target, folder: {"model": str(EagleCase("midlayer").save(folder))},
    "dflash": lambda target, folder: {"model": str(save_dflash(folder))},
    "dflash-own-head": lambda target, folder: {"model": str(save_speculators(folder))},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny(folder, "qwen3", vocab_size=512, hidden_size=64, num_hidden_layers=4)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def proposing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a layer that proposes tokens."""
    (case,) = (one for one in CASES if one.model_type == "qwen3_5_text")
    return case.save(tmp_path_factory.mktemp("mtp") / "model")[0]


def answers(folder: Path, speculative: dict[str, Any] | None) -> dict[str, list[list[int]]]:
    given: dict[str, Any] = {}
    if speculative is not None:
        given = {"speculative_config": speculative, "tuning": {"adapt_draft_length": False}}
    llm = LLM(str(folder), **SIZES, **given)
    found = {name: tokens(llm, PROMPTS, params) for name, params in PARAMS.items()}
    counts = llm.engine.scheduler.counts
    assert (counts.num_draft_tokens > 0) == (speculative is not None)
    if speculative is not None and speculative.get("model") == str(folder):
        assert counts.num_accepted_tokens > counts.num_draft_tokens / 2  # the same model drafts
    llm.close()
    return found


@pytest.fixture(scope="module")
def expected(target: Path) -> dict[str, list[list[int]]]:
    return answers(target, None)


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_plain_decoding(
    method: str, target: Path, tmp_path: Path, expected: dict[str, list[list[int]]]
) -> None:
    given = {"method": method.removesuffix("-own-head"), "num_speculative_tokens": NUM}
    speculative = {**given, **METHODS[method](target, tmp_path / "draft")}
    assert answers(target, speculative) == expected


def test_answers_are_those_without_a_layer_that_proposes(proposing_model: Path) -> None:
    speculative = {"method": "mtp", "num_speculative_tokens": 2}
    assert answers(proposing_model, speculative) == answers(proposing_model, None)


@pytest.mark.parametrize("method", METHODS)
def test_rows_with_a_grammar_verify_drafts_with_masks_along_them(
    method: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matcher, "SLOW_S", 1e9)  # however busy the machine is
    forms = [StructuredOutputsParams(regex=one) for one in ("[^q]{30}", "[a-e]{9,20}")]
    params = [
        SamplingParams(
            temperature=temperature, seed=4, max_tokens=25, ignore_eos=True, structured_outputs=form
        )
        for temperature in (0.0, 1.2) for form in forms
    ]  # fmt: skip
    params.append(greedy(25))
    given = {"method": method.removesuffix("-own-head"), "num_speculative_tokens": NUM}
    speculative = {**given, **METHODS[method](target, tmp_path / "draft")}
    found = []
    for options in ({}, {"speculative_config": speculative}):
        llm = LLM(str(target), **SIZES, tuning={"adapt_draft_length": False}, **options)
        found.append(tokens(llm, PROMPTS, params))
        counts = llm.engine.scheduler.counts
        assert not options or (counts.num_drafts and not counts.num_undrafted)
        llm.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("adapts", [False, True])
def test_tokens_that_a_grammar_forces_are_verified_together(adapts: bool) -> None:
    form = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    sizes = {**SIZES, "tuning": {"adapt_draft_length": adapts}}
    speculative = {"method": "ngram", "num_speculative_tokens": 7}
    params = [
        SamplingParams(temperature=temperature, seed=4, max_tokens=90, structured_outputs=form)
        for temperature in (0.0, 1.2, 0.0)
    ]
    params.append(greedy(25))
    found, steps = [], []
    for given in ({}, {"speculative_config": speculative}):
        llm = LLM("tiny-qwen3", **sizes, **given)
        tokens(llm, PROMPTS[:4], params)  # the grammar is compiled then
        before = llm.engine.metrics.num_steps
        found.append(tokens(llm, PROMPTS[:4], params))
        steps.append(llm.engine.metrics.num_steps - before)
        forced = llm.engine.scheduler.counts.num_forced_tokens
        llm.close()
    assert found[0] == found[1] and forced > 20
    assert adapts or steps[1] < steps[0]


def test_drawn_tokens_have_the_distribution_of_plain_decoding() -> None:
    prompt, num = [*range(40), *[64, 74] * 4], 600
    params = SamplingParams(temperature=6.0, top_k=6, max_tokens=3, ignore_eos=True)
    speculative = {
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }  # fmt: skip
    found = []
    for number, given in enumerate(({}, {"speculative_config": speculative})):
        sizes: dict[str, Any] = {
            "device": "cuda", "max_model_len": 64, "num_kvcache_blocks": 200,
            "graph_batch_sizes": (64,), "max_num_seqs": 64, "max_num_batched_tokens": 256,
            "tuning": {"adapt_draft_length": False},
        }  # fmt: skip
        llm = LLM("tiny-qwen3", seed=number, **sizes, **given)
        found.append(Counter(one[1] for one in tokens(llm, [prompt] * num, params)))
        accepted = llm.engine.scheduler.counts.accepted_at[0]
        llm.close()
    assert accepted > num / 20
    assert_one_distribution(*found)
