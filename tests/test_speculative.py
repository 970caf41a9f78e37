"""The option speculative_config: what it means, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm import EngineConfig, speculative
from nanovllm.checks import InvalidValue, to_options
from nanovllm.speculative import SpeculativeConfig
from nanovllm.startup.speculation import BUILDERS

DRAFT = {"method": "draft_model", "model": "a/b", "num_speculative_tokens": 3}

EAGLE3 = {"method": "eagle3"}
NGRAM = {"method": "ngram", "model": None, "num_speculative_tokens": 3}

SUFFIX: dict[str, Any] = {"method": "suffix", "model": None, "num_speculative_tokens": 3}
SYNTHETIC = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.5}


def make(given: Any, **options: Any) -> EngineConfig:
    return EngineConfig("m", speculative_config=given, **options)


def test_a_model_alone_means_a_draft_model() -> None:
    config = make({"model": Path("/a/b"), "num_speculative_tokens": 3})
    assert config.speculative_config == {**DRAFT, "model": "/a/b"}


def test_it_reaches_other_processes_as_it_is() -> None:
    config = make(DRAFT, data_parallel_size=2)
    assert EngineConfig(**json.loads(json.dumps(to_options(config)))) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "eagle"}, "method is 'eagle': it must be one of draft_model, eagle3"),
        ({"method": None, "model": None}, "method is None: it must be one of"),
        ({"model": ""}, "model is '': it must be a folder or a Hub id"),
        ({"model": None}, "method 'draft_model' needs model"),
        ({"num_speculative_tokens": None}, "'draft_model' needs num_speculative_tokens"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0: .* at least 1, at most 64"),
        ({"num_speculative_tokens": 65}, "num_speculative_tokens is 65"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens is True"),
        ({"quantization": "int8"}, "quantization is 'int8', which method 'draft_model' does not"),
        ({**EAGLE3, "quantization": "int2"}, "quantization is 'int2': it must be one of"),
        ({"prompt_lookup_min": 2}, "prompt_lookup_min is 2, which method 'draft_model' does not"),
        ({**NGRAM, "model": "a"}, "model is 'a', which method 'ngram' does not take"),
        ({**NGRAM, "num_speculative_tokens": None}, "'ngram' needs num_speculative_tokens"),
        ({**NGRAM, "prompt_lookup_max": 65}, "prompt_lookup_max is 65: .* at most 64"),
        (
            {**NGRAM, "prompt_lookup_min": 4, "prompt_lookup_max": 3},
            r"prompt_lookup_min is 4: it must be at most prompt_lookup_max \(3\)",
        ),
        ({**SUFFIX, "prompt_lookup_min": 2}, "min is 2, which method 'suffix' does not take"),
        ({**SUFFIX, "suffix_decoding_max_tree_depth": 65}, "tree_depth is 65: .* at most 64"),
        ({**SUFFIX, "suffix_decoding_max_cached_tokens": -1}, "cached_tokens is -1: .* at least 0"),
        ({"synthetic_acceptance_length": 2}, "'synthetic' and a length need each other"),
        ({"rejection_sample_method": "synthetic"}, "'synthetic' and a length need each other"),
        ({"rejection_sample_method": "typical"}, "rejection_sample_method is 'typical': .* strict"),
        ({**SYNTHETIC, "synthetic_acceptance_length": 0.5}, "length is 0.5: .* at least 1"),
        ({**SYNTHETIC, "synthetic_acceptance_length": 4.5}, r"is 4.5: .* at most num_.* \(4\)"),
        ({"draft_confidence": 0.5}, "has draft_confidence: the keys are method, model, num_spec"),
    ],
)
def test_wrong_values_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue, match=f"^speculative_config.*{words}") as caught:
        make({**DRAFT, **changes})
    assert caught.value.field == "speculative_config"


def test_it_sets_the_draft_lengths_itself() -> None:
    assert make(DRAFT).verified_lengths[-1] == 3
    assert EngineConfig("m", draft_lengths=(4, 2)).verified_lengths == (2, 4)
    with pytest.raises(ValueError, match=r"draft_lengths=\[3\] does not go with speculative_conf"):
        make(DRAFT, draft_lengths=(3,))


def test_models_that_pool_refuse_it() -> None:
    with pytest.raises(ValueError, match="task='embed' does not go with speculative_config="):
        make(DRAFT, task="embed")


def test_one_length_of_lookups_stands_for_both() -> None:
    lengths = [
        SpeculativeConfig.of({**NGRAM, **given}).ngram_lengths
        for given in ({}, {"prompt_lookup_max": 3}, {"prompt_lookup_min": 7},
                      {"prompt_lookup_min": 2, "prompt_lookup_max": 4})
    ]  # fmt: skip
    assert lengths == [(5, 5), (3, 3), (7, 7), (2, 4)]


@pytest.mark.parametrize("mean", [1, 1.7, 2.5, 4])
def test_a_synthetic_length_is_the_sum_over_positions(mean: float) -> None:
    given = {**DRAFT, **SYNTHETIC, "synthetic_acceptance_length": mean}
    rate = SpeculativeConfig.of(given).synthetic_rate
    assert rate is not None and 1 + rate + rate**2 + rate**3 == pytest.approx(mean)
    assert SpeculativeConfig.of(DRAFT).synthetic_rate is None


def test_every_method_has_a_builder() -> None:
    assert BUILDERS.keys() == speculative.METHODS.keys()
