"""Layers with a recurrent state give the plain loop's tokens on device "npu"."""

from __future__ import annotations

from collections.abc import Iterator
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
from tests.models import recurrent
from tests.npu.ge import Ge
from tests.npu.host import Host, host_view
from tests.npu.test_families_npu import MODES, PROMPTS, SIZES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[list[int]]]]:
    """A checkpoint, and the answers of the plain loop."""
    with recurrent.checkpoint(tmp_path_factory.mktemp("recurrent")) as folder:
        yield folder, [recurrent.greedy_tokens(folder, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_a_plain_loop(
    mode: str,
    checkpoint: tuple[Path, list[list[int]]],
    host: Host,
    ge: Ge,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks and batches, with padding, and with proposals that are wrong in part."""
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))
    folder, expected = checkpoint
    options: dict[str, Any] = {**SIZES, **MODES[mode], "draft_lengths": [2]}
    llm = LLM(str(folder), device="npu", **options)
    answers = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, expected)}

    def propose(request: Request) -> list[int]:
        known = len(request.output_ids)
        right = answers[tuple(request.prompt_ids)][known : known + 2]
        return right if known % 3 else [(token + 1) % recurrent.VOCAB_SIZE for token in right]

    assert generated(llm, PROMPTS, greedy(12)) == expected
    llm.engine.propose = propose
    assert generated(llm, PROMPTS, greedy(12)) == expected
    for kept in llm.engine.runner.snapshots.states:
        assert not host_view(kept.of_rows).isnan().any()
    llm.close()
