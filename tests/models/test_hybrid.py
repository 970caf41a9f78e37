"""Hybrid decoders give transformers' logits and tokens, however their steps are cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.config import EngineConfig
from nanovllm.schedule.request import Request
from nanovllm.startup.resolve import resolve_without_weights
from tests.conftest import save_tiny
from tests.engines import greedy, tokens
from tests.models import test_shards
from tests.models.families import VOCAB_SIZE, Family
from tests.models.harness import (
    check_bf16,
    engine_logits,
    load,
    max_difference,
    sequences,
    transformers_model,
)
from tests.models.hybrid_cases import CASES, HYBRID
from tests.models.test_families import GRAPH_SIZES, difference, make_sums_exact, real_values

TOLERANCE = 1e-4
TEXT = ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
SIZES: dict[str, Any] = {
    "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64,
    "kvcache_block_size": 16, "num_kvcache_blocks": 65, "graph_batch_sizes": [4],
    "skip_tokenizer_init": True, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case.name: case.save(tmp_path_factory.mktemp(case.name)) for case in CASES}


def prompts_of(*lengths: int) -> list[list[int]]:
    return [one.token_ids for one in sequences(VOCAB_SIZE, *((n, n) for n in lengths))]


@torch.no_grad()
def expected_tokens(folder: Path, prompt: list[int], num: int) -> list[int]:
    """The likeliest answer of transformers."""
    model, ids = transformers_model(folder, "cpu"), list(prompt)
    for _ in range(num):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.shows("eager", "graph", "GPU", architectures=TEXT)
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_transformers(
    case: Family, mode: str, device: str, folders: dict[str, Path]
) -> None:
    """Prompts in chunks and beside each other, and tokens after them."""
    options: dict[str, Any] = {"enforce_eager": True} if mode == "eager" else GRAPH_SIZES
    assert difference(case, folders[case.name], device, **options) <= TOLERANCE


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_bf16_agrees_up_to_rounding(case: Family, device: str, tmp_path: Path) -> None:
    """With small weights: rounding changes a token's experts, and short keys have few digits."""
    folder = case.save(tmp_path, initializer_range=0.03)
    known = sequences(VOCAB_SIZE, *case.lengths)
    make_sums_exact(folder)
    check_bf16(folder, device, known, enforce_eager=True)


def test_answers_survive_batches_preemption_and_shared_prefixes(
    device: str, folders: dict[str, Path]
) -> None:
    folder, options = folders["qwen3_5"], SIZES
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
    check_rejected_proposals(folders["qwen3_next"], device)


def check_rejected_proposals(folder: Path, device: str) -> None:
    """Right and wrong proposals in all mixtures, over blocks and beside rows without any."""
    prompts = prompts_of(30, 70, 1)
    plain = LLM(str(folder), device=device, **SIZES, enforce_eager=True)
    expected = tokens(plain, prompts, greedy(24))
    llm = LLM(str(folder), device=device, **SIZES, draft_lengths=[3], enforce_eager=True)
    right = dict(zip(map(tuple, prompts), expected))

    def propose(request: Request) -> list[int]:
        prompt, done = request.prompt_ids, len(request.output_ids)
        given = right[tuple(prompt)][done : done + 3]
        num_right = (done * 7 + len(prompt)) % 4
        wrong = [(token + 1) % VOCAB_SIZE for token in given[num_right:]]
        return [] if done % 5 == 4 else given[:num_right] + wrong

    llm.engine.propose = propose
    assert tokens(llm, prompts, greedy(24)) == expected
    assert llm.engine.metrics.num_steps < 24


@pytest.mark.shows("ranks", architectures=TEXT)
@pytest.mark.parametrize(("name", "size"), [("qwen3_next", 4), ("qwen3_5", 4), ("qwen3_5_moe", 2)])
def test_ranks_give_the_logits_of_one(name: str, size: int, folders: dict[str, Path]) -> None:
    """Two key-value heads, so that four ranks have them twice."""
    experts = {} if name == "qwen3_5" else {"expert_parallel": False}
    test_shards.check(folders[name], size, VOCAB_SIZE, **experts)


def test_more_ranks_than_key_heads_are_refused(tmp_path: Path) -> None:
    changes = {**HYBRID, "linear_num_key_heads": 2, "vocab_size": 99}
    folder = save_tiny(tmp_path / "m", "qwen3_5_text", **changes)
    config = EngineConfig.from_options(str(folder), test_shards.options(4))
    with pytest.raises(ValueError, match="must divide the 2 parts of the state 'conv'"):
        resolve_without_weights(config)


def test_states_in_bf16_change_logits_little(folders: dict[str, Path]) -> None:
    """The state is rounded after each step: the error stays far below that of a model in bf16."""
    folder, known = folders["qwen3_5"], sequences(VOCAB_SIZE, (19, 99))
    plain, rounded = (
        load(folder, "cpu", enforce_eager=True, state_dtype=dtype) for dtype in ("auto", "bfloat16")
    )
    dtypes = [
        {x.dtype for cache in runner.steps.caches if len(cache) == 2 for x in cache}
        for runner in (plain, rounded)
    ]
    assert torch.bfloat16 not in dtypes[0] and torch.bfloat16 in dtypes[1]
    expected, found = (engine_logits(runner, known)[0] for runner in (plain, rounded))
    assert torch.equal(found[:19], expected[:19]), "rounded after the prompt alone"
    error = (found - expected).std() / expected.std()
    assert 1e-5 < error < 1e-2, error


def test_a_state_dtype_needs_a_state(tiny_qwen3: Path) -> None:
    with pytest.raises(ValueError, match="state_dtype is 'bfloat16', but Qwen3ForCausalLM has no"):
        load(tiny_qwen3, "cpu", state_dtype="bfloat16")


def test_int8_logits_are_those_of_the_stored_integers(folders: dict[str, Path]) -> None:
    known = sequences(VOCAB_SIZE, (19, 24))
    options = {"enforce_eager": True}
    plain, int8 = (
        load(folders["qwen3_5"], "cpu", quantization=how, **options) for how in (None, "int8")
    )
    plain.steps = replace(plain.steps, params=real_values(int8.params))
    found = engine_logits(int8, known)
    assert max_difference(found, engine_logits(plain, known)) <= TOLERANCE


def test_an_fp8_cache_holds_every_key_and_value_within_its_scale(folders: dict[str, Path]) -> None:
    known, options = sequences(VOCAB_SIZE, (99, 103)), {"enforce_eager": True}
    runner = load(folders["qwen3_5"], "cpu", kv_cache_dtype="fp8", **options)
    found = engine_logits(runner, known)[0]
    plain = engine_logits(load(folders["qwen3_5"], "cpu", **options), known)[0]
    assert 1e-5 < (found - plain).std() / plain.std() < 0.2
    pages = runner.steps.pages
    for stored in (pages.k_CBKH, pages.v_CBKH):
        assert stored.float().nan_to_num(0.0).abs().max() < 448
