"""Models with latents give the CPU's tokens on device "npu" in eager mode, and have no graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanovllm import LLM
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.platforms import npu
from tests.models.latent_cases import BY_NAME
from tests.npu.host import Host, host_view
from tests.npu.test_families_npu import MODES, SIZES, tokens

# more tokens than in other tests, since longer steps have another form of attention
LATENT_SIZES = {**SIZES, "max_num_batched_tokens": 64}


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))


@pytest.mark.shows("NPU", architectures=["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("name", ["v2-lite", "v3"])
def test_eager_tokens_are_the_cpus(
    name: str, host: Host, in_fp32: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = str(BY_NAME[name].save(tmp_path, num_hidden_layers=2))
    with monkeypatch.context() as patch:
        patch.setattr(cpu_library, "available", lambda *args, **kwargs: (False, "plain torch"))
        alone = LLM(folder, device="cpu", enforce_eager=True, **LATENT_SIZES)
        expected = tokens(alone)
        alone.close()
    llm = LLM(folder, device="npu", enforce_eager=True, **LATENT_SIZES)
    for cache in llm.engine.runner.steps.caches:
        host_view(cache.latent_CBZ)[0].fill_(float("nan"))
    assert tokens(llm) == expected
    llm.close()


@pytest.mark.parametrize("mode", ["ge", "captured"])
def test_graphs_are_refused_by_name(mode: str, host: Host, in_fp32: None, tmp_path: Path) -> None:
    folder = str(BY_NAME["v3"].save(tmp_path, num_hidden_layers=1, first_k_dense_replace=0))
    with pytest.raises(ValueError, match=r"attention over latents .* use enforce_eager=True"):
        LLM(folder, device="npu", **LATENT_SIZES, **MODES[mode])
