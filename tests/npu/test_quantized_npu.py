"""Quantized checkpoints on device "npu": dequantized at the load, they give the CPU's tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanovllm import LLM
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.platforms import npu
from tests.conftest import save_tiny
from tests.models.test_quantized_checkpoints import BY_NAME, pack
from tests.npu.host import Host
from tests.npu.test_families_npu import MODES, SIZES, tokens


@pytest.mark.parametrize(("name", "mode"), [("fp8 blocks", "ge"), ("awq", "eager")])
def test_greedy_tokens_are_those_of_the_real_numbers(
    name: str,
    mode: str,
    tmp_path: Path,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))
    monkeypatch.setattr(cpu_library, "available", lambda *_, **__: (False, "plain torch"))
    folder = pack(BY_NAME[name], save_tiny(tmp_path, vocab_size=99))
    on_cpu = LLM(str(folder / "real"), device="cpu", enforce_eager=True, **SIZES)
    expected = tokens(on_cpu)
    on_cpu.close()
    llm = LLM(str(folder), device="npu", **SIZES, **MODES[mode])
    assert tokens(llm) == expected
    llm.close()
    assert "weights are dequantized to float32" in caplog.text
    assert "a npu device has no products of quantized weights" in caplog.text
