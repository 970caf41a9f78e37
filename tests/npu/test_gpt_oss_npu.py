"""gpt-oss on device "npu" gives the CPU's tokens in eager mode; graphs are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.platforms import npu
from tests.models.gpt_oss_cases import NAME, save
from tests.npu.host import Host, host_view
from tests.npu.test_families_npu import MODES, SIZES

# of two groups of layers
BLOCKS: dict[str, Any] = {**SIZES, "num_kvcache_blocks": 17}
# one of them in two steps, which is longer than the window
PROMPTS = [[7], list(range(20, 39))]


def tokens(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    return [one["token_ids"] for one in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))
    return str(save(tmp_path, num_hidden_layers=2))


@pytest.mark.shows("NPU", architectures=[NAME])
def test_greedy_tokens_are_the_cpus(
    folder: str, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding reaches no token: the block that only padding writes holds NaN."""
    monkeypatch.setattr(cpu_library, "available", lambda *_, **__: (False, "plain torch"))
    on_cpu = LLM(folder, device="cpu", **BLOCKS, **MODES["eager"])
    expected = tokens(on_cpu)
    on_cpu.close()
    llm = LLM(folder, device="npu", **BLOCKS, **MODES["eager"])
    for cache in llm.engine.runner.steps.caches:
        for tensor in (cache.k_CBKH, cache.v_CBKH):
            host_view(tensor)[0].fill_(float("nan"))
    assert tokens(llm) == expected
    llm.close()


@pytest.mark.parametrize("mode", ["ge", "captured"])
def test_graphs_are_refused(mode: str, folder: str, host: Host) -> None:
    message = f"the attention of {NAME} has sinks, which graphs on the device npu do not support"
    with pytest.raises(ValueError, match=message):
        LLM(folder, device="npu", **BLOCKS, **MODES[mode])
