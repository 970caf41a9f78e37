"""Architectures with windows, shared caches or heads of several sizes give the CPU's tokens on
device "npu" in eager mode. Graphs of windows are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.platforms import npu
from tests.models.families import FAMILIES
from tests.npu.host import Host
from tests.npu.test_families_npu import MODES, SIZES, tokens

BY_NAME = {one.name: one for one in FAMILIES}
# of two groups of layers, and prefill steps with more tokens than a window
BLOCKS: dict[str, Any] = {**SIZES, "num_kvcache_blocks": 33, "max_num_batched_tokens": 32}


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))


CASES = ("olmo3", "exaone4", "cohere2", "gemma4", "gemma4-small", "gemma4-experts")
SHOWN = (
    "Olmo3ForCausalLM", "Exaone4ForCausalLM", "Cohere2ForCausalLM", "Gemma4ForCausalLM",
)  # fmt: skip


@pytest.mark.shows("NPU", architectures=SHOWN)
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_the_cpus(
    name: str, host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = str(BY_NAME[name].save(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(cpu_library, "available", lambda *_, **__: (False, "plain torch"))
        alone = LLM(folder, device="cpu", **BLOCKS, **MODES["eager"])
        expected = tokens(alone)
        alone.close()
    llm = LLM(folder, device="npu", **BLOCKS, **MODES["eager"])
    assert tokens(llm) == expected
    llm.close()


@pytest.mark.parametrize("mode", ["ge", "captured"])
def test_graphs_of_windows_are_refused(mode: str, host: Host, tmp_path: Path) -> None:
    folder = str(BY_NAME["cohere2"].save(tmp_path))
    with pytest.raises(ValueError, match="attention windows, which graphs on the device npu"):
        LLM(folder, device="npu", **BLOCKS, **MODES[mode])
