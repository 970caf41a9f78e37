"""Drafts on device "npu": eager steps verify them, and graphs refuse them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.platforms import npu
from tests.models.families import FAMILIES
from tests.npu.test_families_npu import PROMPTS, SIZES
from tests.runner.heads import EagleCase

HEAD = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 0, 1]}}
PARAMS = [
    SamplingParams(temperature=temperature, seed=3, max_tokens=9, ignore_eos=True)
    for temperature in (0.0, 1.0)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = next(one for one in FAMILIES if one.name == "smollm3")
    return family.save(tmp_path_factory.mktemp("npu") / "model")


@pytest.fixture(autouse=True)
def has_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    traits = replace(npu.TRAITS, supported_dtypes=(torch.float32,))
    monkeypatch.setattr(npu, "TRAITS", traits)


def answers(folder: Path, **options: Any) -> tuple[list[Any], int]:
    """The tokens, and how many rows of steps have verified drafts."""
    llm = LLM(str(folder), device="npu", **{**SIZES, "enforce_eager": True, **options})
    found = [
        [one["token_ids"] for one in llm.generate(PROMPTS, params, use_tqdm=False)]
        for params in PARAMS
    ]
    num_drafts = llm.engine.scheduler.counts.num_drafts
    llm.close()
    return found, num_drafts


def speculative(method: str, folder: Path, tmp_path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = {"method": method, "num_speculative_tokens": 2}
    if method == "draft_model":
        spec["model"] = str(folder)
    if method == "eagle3":
        config = json.loads((folder / "config.json").read_text())
        head = EagleCase("midlayer", HEAD).on(config["hidden_size"], config["vocab_size"])
        spec["model"] = str(head.save(tmp_path / "head"))
    return {"speculative_config": spec, "tuning": {"adapt_draft_length": False}}


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle3"])
def test_eager_steps_verify_drafts(method: str, folder: Path, tmp_path: Path) -> None:
    expected, _ = answers(folder)
    found, num_drafts = answers(folder, **speculative(method, folder, tmp_path))
    assert found == expected
    assert num_drafts > 20


def test_graphs_refuse_drafts(folder: Path, tmp_path: Path) -> None:
    options = speculative("ngram", folder, tmp_path)
    with pytest.raises(ValueError, match="not supported on a npu device with graphs"):
        answers(folder, enforce_eager=False, **options)
