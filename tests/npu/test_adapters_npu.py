"""Requests with adapters get the CPU's tokens on device "npu", whose steps are whole graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.platforms import npu
from tests.models import lora_cases
from tests.models.families import FAMILIES
from tests.npu.test_families_npu import MODES, PROMPTS, SIZES

LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 4}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[LoRARequest | None]]:
    """A checkpoint, and the adapter of each prompt: three in two slots."""
    root = tmp_path_factory.mktemp("adapters")
    family = next(one for one in FAMILIES if one.name == "smollm3")
    folder = family.save(root / "model")
    found: list[LoRARequest | None] = [None]
    for number in (1, 2, 3):
        adapter = lora_cases.save_adapter(root / str(number), folder, seed=number)
        found.append(LoRARequest(str(number), number, str(adapter)))
    return str(folder), found


def tokens(folder: str, adapters: list[LoRARequest | None], **options: Any) -> list[list[int]]:
    llm = LLM(folder, **{**SIZES, **LORA, **options})
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False, lora_request=adapters)
    llm.close()
    return [output["token_ids"] for output in outputs]


@pytest.fixture(scope="module")
def expected(case: tuple[str, list[LoRARequest | None]]) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "available", lambda *args, **kwargs: (False, "plain torch"))
        return tokens(*case, device="cpu", enforce_eager=True)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_the_cpus(
    mode: str,
    case: tuple[str, list[LoRARequest | None]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))
    assert tokens(*case, device="npu", **MODES[mode]) == expected


def test_each_adapter_changes_the_tokens(case: tuple[str, Any], expected: list[list[int]]) -> None:
    plain = tokens(case[0], [None] * 4, device="cpu", enforce_eager=True)
    assert [one != other for one, other in zip(plain, expected)] == [False, True, True, True]
