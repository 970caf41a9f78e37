"""Layers that propose tokens draft what transformers' layers of the same kind give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.startup.draft_heads import Mtp
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts
from tests.engines import tokens as llm_tokens
from tests.runner.heads import Watched, make
from tests.runner.mtp_cases import CASES, MtpCase
from tests.runner.proposers import MODES, SIZES, tokens

NUM = 3
PROMPTS = [[one % 96 for one in prompt] for prompt in random_prompts([19, 1, 40], seed=3)]
ONE_STEP = {"max_num_batched_tokens": 128}  # each prompt in one piece


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MtpCase, Path, Any]:
    one: MtpCase = request.param
    return one, *one.save(tmp_path_factory.mktemp("mtp") / "model")


def test_a_layer_drafts_what_transformers_gives(case: tuple[MtpCase, Path, Any]) -> None:
    one, folder, hf = case
    watched = Watched(Mtp(NUM))
    engine = make(folder, watched, NUM, **ONE_STEP, **MODES["eager"])
    for prompt in PROMPTS:
        watched.seen.clear()
        (answer,) = tokens(engine, [prompt], greedy(12))
        sequence = prompt + answer
        checked = [seen for seen in watched.seen if seen[0] < len(sequence)]
        assert len(checked) > 3
        for pos, drafted in checked:
            assert drafted == one.drafts(hf, sequence[: pos + 1], NUM), f"after {pos}"
    engine.close()


def test_answers_are_those_without_the_layer(case: tuple[MtpCase, Path, Any]) -> None:
    _, folder, _ = case
    llm = LLM(str(folder), **SIZES, **MODES["eager"])
    expected = llm_tokens(llm, PROMPTS, greedy(12))
    llm.close()
    speculative = {"method": "mtp", "num_speculative_tokens": 2}
    llm = LLM(str(folder), speculative_config=speculative, **SIZES, **MODES["eager"])
    assert llm_tokens(llm, PROMPTS, greedy(12)) == expected
    llm.close()


@pytest.mark.usefixtures("lowered_ops")
def test_captured_steps_draft_the_same(tmp_path: Path) -> None:
    """Their graphs run node by node here."""
    folder, _ = CASES[0].save(tmp_path / "model")
    seen = []
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 16}
    for options in (MODES["eager"], {"graph_batch_sizes": (2,)}):
        watched = Watched(Mtp(2))
        engine = make(folder, watched, 2, **sizes, **options)
        watched.seen.clear()
        tokens(engine, PROMPTS, greedy(9))
        seen.append(sorted(watched.seen))
        engine.close()
    assert seen[0] == seen[1]


def test_models_without_such_a_layer_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense")
    with pytest.raises(ValueError, match="method 'mtp' is not supported for Qwen3ForCausalLM"):
        make(folder, Mtp(NUM), NUM, **MODES["eager"])
    folder = save_tiny(tmp_path / "without", "qwen3_5_text", layer_types=["full_attention"] * 2)
    message = "has no layer that proposes tokens: it lacks mtp.fc.weight"
    with pytest.raises(ValueError, match=message):
        make(folder, Mtp(NUM), NUM, **MODES["eager"])
