"""Decoders with Mamba-2 mixers give transformers' logits and tokens, however steps are cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.config import EngineConfig
from nanovllm.startup.resolve import resolve_without_weights
from tests.architectures import of_types
from tests.engines import greedy, tokens
from tests.models import test_shards
from tests.models.families import VOCAB_SIZE, Family
from tests.models.harness import check_bf16, engine_logits, load, max_difference, sequences
from tests.models.mamba_cases import CASES
from tests.models.test_families import GRAPH_SIZES, difference, real_values
from tests.models.test_hybrid import SIZES, check_rejected_proposals, expected_tokens, prompts_of

TOLERANCE = 1e-4
TEXT = of_types(*(case.model_type for case in CASES))
NAMES = tuple(dict.fromkeys(case.model_type for case in CASES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case.name: case.save(tmp_path_factory.mktemp(case.name)) for case in CASES}


@pytest.mark.shows("eager", "graph", architectures=TEXT)
@pytest.mark.parametrize(
    ("case", "mode"), [(case, mode) for case in CASES for mode in case.modes], ids=str
)
def test_logits_are_those_of_transformers(
    case: Family, mode: str, device: str, folders: dict[str, Path]
) -> None:
    """Prompts in chunks and beside each other, and tokens after them."""
    options: dict[str, Any] = {"enforce_eager": True} if mode == "eager" else GRAPH_SIZES
    assert difference(case, folders[case.name], device, **options) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_bf16_agrees_up_to_rounding(name: str, device: str, tmp_path: Path) -> None:
    folder = next(case for case in CASES if case.name == name).save(tmp_path)
    check_bf16(folder, device, sequences(VOCAB_SIZE, (1, 6), (99, 103)), enforce_eager=True)


@pytest.mark.parametrize("name", NAMES)
def test_answers_survive_batches_preemption_and_shared_prefixes(
    name: str, device: str, folders: dict[str, Path]
) -> None:
    folder, options = folders[name], {**SIZES, "enforce_eager": device == "cpu"}
    prompts = prompts_of(130, 70, 1, 16)
    expected = [expected_tokens(folder, prompt, 12) for prompt in prompts]
    llm = LLM(str(folder), device=device, **options)
    assert tokens(llm, prompts, greedy(12)) == expected
    assert llm.engine.metrics.num_cached_tokens == 0
    assert tokens(llm, prompts, greedy(12)) == expected
    assert llm.engine.metrics.num_cached_tokens == 128
    small = LLM(str(folder), device=device, **options | {"num_kvcache_blocks": 17})
    grown = tokens(llm, prompts[2:], greedy(90))
    assert tokens(small, prompts[1:] + prompts[2:], greedy(90))[1:] == grown + grown
    assert small.engine.scheduler.num_preemptions


def test_rejected_proposals_are_rolled_back(device: str, folders: dict[str, Path]) -> None:
    check_rejected_proposals(folders[NAMES[-1]], device)


@pytest.mark.parametrize("name", NAMES)
def test_an_fp8_cache_and_states_in_bf16_change_logits_little(
    name: str, folders: dict[str, Path]
) -> None:
    """And every key and value is within its scale."""
    known, folder = sequences(VOCAB_SIZE, (99, 103)), folders[name]
    changes = {"kv_cache_dtype": "fp8"}, {"state_dtype": "bfloat16"}
    plain, fp8, bf16 = (
        load(folder, "cpu", enforce_eager=True, **change) for change in ({}, *changes)
    )
    expected, *found = (engine_logits(runner, known)[0] for runner in (plain, fp8, bf16))
    for one, most in zip(found, (0.2, 1e-2)):
        assert 1e-7 < (one - expected).std() / expected.std() < most
    pages = fp8.steps.pages
    for stored in (pages.k_CBKH, pages.v_CBKH):
        assert stored.float().nan_to_num(0.0).abs().max() < 448


@pytest.mark.parametrize("name", NAMES)
def test_int8_logits_are_those_of_the_stored_integers(name: str, folders: dict[str, Path]) -> None:
    known, folder = sequences(VOCAB_SIZE, (19, 24)), folders[name]
    plain, int8 = (
        load(folder, "cpu", quantization=how, enforce_eager=True) for how in (None, "int8")
    )
    before = engine_logits(plain, known)
    plain.steps = replace(plain.steps, params=real_values(int8.params))
    found = engine_logits(int8, known)
    assert max_difference(found, engine_logits(plain, known)) <= TOLERANCE
    assert max_difference(found, before) > TOLERANCE


@pytest.mark.shows("ranks", architectures=TEXT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_give_the_logits_of_one(case: Family, folders: dict[str, Path]) -> None:
    test_shards.check(folders[case.name], 2, VOCAB_SIZE)


def test_more_ranks_than_groups_are_refused(folders: dict[str, Path]) -> None:
    config = EngineConfig.from_options(str(folders["falcon_h1"]), test_shards.options(4))
    with pytest.raises(ValueError, match="must divide the 2 parts of the state 'conv'"):
        resolve_without_weights(config)
