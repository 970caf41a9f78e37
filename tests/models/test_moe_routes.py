"""Unusual routes: one expert for all tokens, none for an expert, equal scores; mistakes show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.models.experts.stacked import Stacked
from nanovllm.models.moe import SparseLayer
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits
from tests.models.moe_cases import (
    ARCHITECTURES,
    LENGTHS,
    TOLERANCE,
    VOCAB_SIZE,
    Case,
    assert_same,
    matrices,
    routers,
    towards,
)
from tests.models.routes import edit, engine_routes, transformers_routes


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_tokens_may_choose_one_expert_and_none_another(
    architecture: str, top_k: int, device: str, tmp_path: Path
) -> None:
    """Weights of an expert that no token chooses are not read: they are NaN."""
    folder = edit(Case(architecture, 6, top_k).save(tmp_path), towards(4, 1))
    known = sequences(VOCAB_SIZE, *LENGTHS)
    expected = transformers_routes(folder, known, device)
    assert {route[0] for route in expected[1].values()} == {4}
    assert not any(1 in route for route in expected[1].values())
    assert_same(engine_routes(load(folder, device, enforce_eager=True), known), expected)


def twins(weights: dict[str, Tensor]) -> None:
    """Experts 2n and 2n + 1 have the same weights and the same row of the router."""
    for router_ED in routers(weights):
        router_ED[1::2] = router_ED[::2]
    for expert in range(0, 6, 2):
        other = matrices(weights, expert + 1)
        for name, matrix in matrices(weights, expert).items():
            other[name].copy_(matrix)


def clones(weights: dict[str, Tensor]) -> None:
    """All experts are the same, and all scores are."""
    for router_ED in routers(weights):
        router_ED.zero_()
    for expert in range(1, 6):
        other = matrices(weights, expert)
        for name, matrix in matrices(weights, 0).items():
            other[name].copy_(matrix)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
@pytest.mark.parametrize("ties", [twins, clones])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_experts_with_equal_scores_the_smaller_come_first(
    architecture: str, ties: Callable[..., None], top_k: int, device: str, tmp_path: Path
) -> None:
    """transformers may choose another of them, which has the same weights."""
    case = Case(architecture, 6, top_k, {"num_hidden_layers": 2})
    folder, known = edit(case.save(tmp_path), ties), sequences(VOCAB_SIZE, (1, 5), (19, 22))
    expected, theirs = transformers_routes(folder, known, device)
    logits, ours = engine_routes(load(folder, device, enforce_eager=True), known)
    assert max_difference(logits, expected) <= TOLERANCE
    if ties is clones:
        assert set(map(tuple, ours.values())) == {tuple(range(top_k))}
        return
    for place, route in ours.items():
        # the best pair is in front, and of each pair the even expert is before the odd one
        pairs = [expert // 2 for expert in route]
        assert pairs == [expert // 2 for expert in theirs[place]]
        assert all(expert % 2 == idx % 2 for idx, expert in enumerate(route))


# Mistakes must be visible -------------------------------------------------------------------------


def test_one_changed_number_in_any_weight_shows(device: str, tmp_path: Path) -> None:
    case = Case("qwen2_moe", 4, 2, {"num_hidden_layers": 1})
    folder, known = case.save(tmp_path), sequences(VOCAB_SIZE, (19, 24))
    runner = load(folder, device, enforce_eager=True)
    expected = transformers_logits(folder, known, device)
    layer = runner.params.layers[0]
    names = [name for name in SparseLayer._fields if name != "experts"]
    weights = {name: getattr(layer, name) for name in names}
    weights |= {name: getattr(layer.experts, name) for name in Stacked._fields}
    present = {name: weight for name, weight in weights.items() if weight is not None}
    assert len(present) == 11
    for name, weight in present.items():
        number = weight.view(-1)[5:6]
        number += 0.2
        assert max_difference(engine_logits(runner, known), expected) > TOLERANCE, name
        number -= 0.2
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"normalize": True}], ids=str)
def test_another_route_shows(changes: dict[str, Any], device: str, tmp_path: Path) -> None:
    folder, known = Case("qwen3_moe", 6, 2).save(tmp_path), sequences(VOCAB_SIZE, (19, 24))
    runner = load(folder, device, enforce_eager=True)
    expected = transformers_routes(folder, known, device)
    config = runner.model.config
    moe = replace(config.moe, **changes)
    model = replace(runner.model, config=replace(config, moe=moe))
    runner.steps = replace(runner.steps, model=model, compiler=Compiler(None))
    logits, routes = engine_routes(runner, known)
    assert max_difference(logits, expected[0]) > TOLERANCE
    first, their_first = (
        {place: route for place, route in one.items() if place[0] == 0}
        for one in (routes, expected[1])
    )
    assert (first == their_first) == ("top_k" not in changes)
