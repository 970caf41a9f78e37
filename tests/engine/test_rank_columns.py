"""On several ranks each one samples from its own columns of the logits; whoever needs all of them
gathers them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.conftest import save_tiny
from tests.engine.test_tensor_parallel import VARIANTS, make
from tests.engines import greedy, random_prompts, tokens

VOCAB_SIZE = 397  # four ranks have 100 columns each, the last one 97 tokens
PROMPTS = [[token % VOCAB_SIZE for token in prompt] for prompt in random_prompts([1, 19, 33, 7])]
NEEDS_ALL = [{"logprobs": 2}, *(VARIANTS[name] for name in ("filtered", "penalties", "edits"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[LLM]:
    llm = make(folder, 1)
    yield llm
    llm.close()


@pytest.fixture(scope="module", params=[2, 4])
def several(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    llm = make(folder, request.param, draft_lengths=(2,))
    yield llm
    llm.close()


@pytest.fixture
def gathered(several: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what the first rank has given to gathers since the test began."""
    group: Any = several.engine.runner.group
    shapes: list[tuple[int, ...]] = []
    all_gather = group.all_gather

    def seen(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return all_gather(x)

    monkeypatch.setattr(group, "all_gather", seen)
    return shapes


def graphs(store: Path) -> dict[str, Any]:
    """Graph mode with a bare store: programs of earlier runs would not reach the lowering."""
    return {"enforce_eager": False, "graph_batch_sizes": [4], "compile_cache": str(store)}


def test_draws_of_any_seed_are_those_of_one_rank(alone: LLM, several: LLM) -> None:
    """Greedy rows and drawn ones share their steps."""
    params = [
        SamplingParams(temperature=(0.0, 0.6, 1.0, 1.7)[i % 4], seed=seed, max_tokens=12)
        for i, seed in enumerate([7, 2**62 + 11, -5, 0, 1, 99, 2**40, -(2**63)])
    ]
    given = PROMPTS * 2
    assert tokens(several, given, params) == tokens(alone, given, params)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "drawn"])
def test_plain_sampling_gathers_one_number_for_each_row(
    params: dict[str, Any], several: LLM, gathered: list[tuple[int, ...]]
) -> None:
    tokens(several, PROMPTS, greedy(6, **params))
    assert gathered and all(len(shape) == 1 and shape[0] <= 4 for shape in gathered)


def test_verifying_proposals_gathers_one_number_for_each_token(
    alone: LLM, several: LLM, gathered: list[tuple[int, ...]]
) -> None:
    expected = tokens(alone, PROMPTS[:1], greedy(12))
    known = PROMPTS[0] + expected[0]

    def propose(request: Any) -> list[int]:
        start = len(request.prompt_ids) + len(request.output_ids)
        return known[start : start + 2]

    several.engine.propose = propose
    try:
        assert tokens(several, PROMPTS[:1], greedy(12)) == expected
    finally:
        several.engine.propose = None
    assert max(gathered) > (1,) and all(len(shape) == 1 for shape in gathered)


@pytest.mark.parametrize("params", NEEDS_ALL, ids=lambda params: next(iter(params)))
def test_other_choices_gather_whole_logits(
    params: dict[str, Any], alone: LLM, several: LLM, gathered: list[tuple[int, ...]]
) -> None:
    wanted = greedy(4, **params)
    assert tokens(several, PROMPTS, wanted) == tokens(alone, PROMPTS, wanted)
    width = -(-VOCAB_SIZE // several.engine.runner.cfg.num_ranks)
    assert gathered and all(shape[1:] == (width,) for shape in gathered)


def test_programs_gather_no_logits(
    folder: Path, alone: LLM, lowered_ops: set[str], bare_store: Path
) -> None:
    """In graph mode; steps that need whole logits compile nothing after warm-up."""
    llm = make(folder, 2, **graphs(bare_store), draft_lengths=(2,))
    try:
        assert "sample_columns" in lowered_ops
        assert not lowered_ops & {"sample", "gather_columns"}
        for params in ({"temperature": 0.8, "seed": 3}, *NEEDS_ALL):
            wanted = greedy(4, **params)
            assert tokens(llm, PROMPTS, wanted) == tokens(alone, PROMPTS, wanted)
    finally:
        llm.close()


def test_one_rank_samples_from_whole_logits(
    folder: Path, lowered_ops: set[str], bare_store: Path
) -> None:
    make(folder, 1, **graphs(bare_store)).close()
    assert "sample" in lowered_ops and not lowered_ops & {"sample_columns", "gather_columns"}
