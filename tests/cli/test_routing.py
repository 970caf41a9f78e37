"""The experts of a decode step, as the benchmark counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.cli.bench.routing import experts_per_step
from tests.engines import assert_all_free, random_prompts

PROMPTS = random_prompts([5, 19, 7], seed=31)


@pytest.fixture
def load() -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def load(**options: Any) -> LLM:
        options = {"enforce_eager": True, "max_model_len": 64, "num_kvcache_blocks": 32, **options}
        made.append(LLM("tiny-mixtral", device="cpu", random_weights=True, **options))
        return made[-1]

    yield load
    for llm in made:
        llm.close()


def measured(llm: LLM, num_rows: int) -> float:
    found = experts_per_step(llm.engine, PROMPTS, num_rows)
    assert_all_free(llm)
    assert found["rows"] == num_rows and found["measured"] is not None
    return found["measured"]


def test_one_row_chooses_as_many_experts_as_a_token_has(load: Callable[..., LLM]) -> None:
    assert measured(load(), 1) == 2
    every = load(hf_overrides={"num_experts_per_tok": 8})
    assert measured(every, 1) == measured(every, 3) == 8


def test_padding_is_not_counted_and_graphs_are_seen(load: Callable[..., LLM]) -> None:
    counts = [
        measured(load(max_num_seqs=8, **options), 3)
        for options in (
            {"pad_batches": False},
            {"graph_batch_sizes": (8,)},
            {"graph_batch_sizes": (8,), "enforce_eager": False},
            {"graph_batch_sizes": (8,), "expert_offload": 3},
        )
    ]
    assert 2 < counts[0] < 6 and counts == counts[:1] * 4


@pytest.mark.parametrize("num_layers", [1, 12])
def test_random_weights_spread_tokens_over_experts_in_any_layer(
    num_layers: int, load: Callable[..., LLM]
) -> None:
    """As the limit of the benchmark takes it to be."""
    changes = {"num_local_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": num_layers}
    llm = load(hf_overrides=changes, max_num_seqs=16, max_model_len=99, num_kvcache_blocks=65)
    found = experts_per_step(llm.engine, random_prompts([80] * 16, seed=32), 16)
    assert found["rows"] == 16
    assert found["measured"] == pytest.approx(found["expected"], rel=0.12)


def test_requests_that_end_with_their_prompt_leave_nothing_to_count(
    load: Callable[..., LLM],
) -> None:
    llm = load(max_model_len=6)
    found = experts_per_step(llm.engine, PROMPTS[:1], 1)
    assert found == {"rows": 0, "expected": 0.0, "measured": None}
    assert_all_free(llm)
