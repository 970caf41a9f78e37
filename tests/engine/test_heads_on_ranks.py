"""Heads that are divided among ranks draft what they draft on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts
from tests.runner.heads import EagleCase
from tests.runner.mtp_cases import CASES
from tests.runner.test_dflash import save_dspark

SIZES: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "enforce_eager": True, "max_num_seqs": 2,
    "max_num_batched_tokens": 64, "max_model_len": 128, "kvcache_block_size": 16,
    "num_kvcache_blocks": 40, "tuning": {"run_ahead": 0, "adapt_draft_length": False},
}  # fmt: skip
(PROMPT,) = random_prompts([19], seed=3)
METHODS = ("eagle3", "dspark", "mtp")


def made(method: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A model, and the option that names its head. The first head drafts 70 of 512 tokens."""
    if method == "mtp":
        case = next(one for one in CASES if one.model_type == "qwen3_5_moe_text")
        return case.save(folder / "model")[0], {"method": "mtp"}
    target = save_tiny(folder, "qwen3", vocab_size=512, hidden_size=64, num_hidden_layers=4)
    if method == "dspark":
        return target, {"method": "dflash", "model": str(save_dspark(folder / "head"))}
    head = EagleCase("head").save(folder / "head")
    return target, {"method": method, "model": str(head)}


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_draft_what_one_drafts(method: str, tmp_path: Path) -> None:
    folder, given = made(method, tmp_path)
    limit = 99 if method == "mtp" else 512
    found = []
    for size in (1, 2):
        llm = LLM(
            str(folder), tensor_parallel_size=size,
            speculative_config={**given, "num_speculative_tokens": 3}, **SIZES,
        )  # fmt: skip
        engine, drafts = llm.engine, []
        engine.add_request([token % limit for token in PROMPT], greedy(12), incremental=False)
        (request,) = engine.scheduler.waiting
        while engine.has_unfinished:
            engine.step()
            if request.row >= 0:
                drafts.append(engine.runner.state.draft_SK[request.row].tolist())
        found.append((request.output_ids, drafts))
        llm.close()
    assert found[0] == found[1]
    assert len({tuple(one) for one in found[0][1]}) > 3, "the drafts differ from step to step"
