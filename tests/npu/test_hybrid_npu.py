"""Hybrid decoders, with layers of a gated delta rule or of Mamba-2, give the CPU's tokens on device
"npu"."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.platforms import npu
from nanovllm.schedule.request import Request
from tests.engines import greedy
from tests.engines import tokens as generated
from tests.models import mamba_cases
from tests.models.families import VOCAB_SIZE
from tests.models.hybrid_cases import CASES
from tests.npu.ge import Ge
from tests.npu.host import Host, host_view
from tests.npu.test_families_npu import MODES, PROMPTS, SIZES

TYPES = (
    "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "FalconH1ForCausalLM",
    "NemotronHForCausalLM",
)  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_5": {"num_hidden_layers": 2, "layer_types": None, "full_attention_interval": 2},
    "falcon_h1": {"num_hidden_layers": 1},
    "nemotron_h": {"layers_block_type": mamba_cases.NEMOTRON["layers_block_type"][:3]},
}


@pytest.fixture(scope="module", params=CHANGES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]]]:
    """A dense checkpoint, and the answers of an engine on a CPU."""
    case = next(one for one in (*CASES, *mamba_cases.CASES) if one.name == request.param)
    folder = case.save(tmp_path_factory.mktemp(case.name), **CHANGES[case.name])
    llm = LLM(str(folder), device="cpu", enforce_eager=True, **SIZES)
    expected = generated(llm, PROMPTS, greedy(12))
    llm.close()
    return folder, expected


@pytest.mark.shows("NPU", architectures=TYPES)
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_a_cpu(
    mode: str,
    checkpoint: tuple[Path, list[list[int]]],
    host: Host,
    ge: Ge,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks and batches, with padding; eager with proposals that are wrong in part, too."""
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))
    folder, expected = checkpoint
    options: dict[str, Any] = {**SIZES, **MODES[mode]}
    options["draft_lengths"] = [2] if mode == "eager" else []
    llm = LLM(str(folder), device="npu", **options)
    answers = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, expected)}

    def propose(request: Request) -> list[int]:
        known = len(request.output_ids)
        right = answers[tuple(request.prompt_ids)][known : known + 2]
        return right if known % 3 else [(token + 1) % VOCAB_SIZE for token in right]

    assert generated(llm, PROMPTS, greedy(12)) == expected
    if mode == "eager":
        llm.engine.propose = propose
        assert generated(llm, PROMPTS, greedy(12)) == expected
    for kept in llm.engine.runner.snapshots.states:
        assert not host_view(kept.of_rows).isnan().any()
    llm.close()
