"""Adapters with biases of linear layers give the logits of merged models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.config import EngineConfig
from nanovllm.models.lora.peft_config import AdapterError
from tests.models import lora_cases, test_shards
from tests.models.families import FAMILIES, VOCAB_SIZE
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits
from tests.models.lora_cases import CONFIG, PREFIX, WEIGHTS
from tests.models.thread_ranks import ThreadGroup, on_ranks

TOLERANCE = 1e-4
LORA: dict[str, Any] = {
    "enable_lora": True, "max_loras": 2, "max_lora_rank": 5, "lora_biases": True
}  # fmt: skip
FAMILY = "starcoder2"  # biases of all linear layers


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, an adapter that PEFT would write with bias="all", and both merged. The biases of k
    and c_proj are trained although their weights have no matrices."""
    root = tmp_path_factory.mktemp("biases")
    family = next(one for one in FAMILIES if one.name == FAMILY)
    folder = family.save(root / "model")
    adapter = lora_cases.save_adapter(
        root / "adapter", folder, std=0.1, bias="all",
        named=lambda module: module.endswith(("q_proj", "v_proj", "o_proj")),
    )  # fmt: skip
    merged = lora_cases.save_merged(root / "merged", folder, adapter)
    weights, tensors = load_file(merged / "model.safetensors"), load_file(adapter / WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        if name.endswith("proj.bias") and ".layers." in name:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
            module = name.removesuffix(".bias")
            wraps = f"{PREFIX}{module}.lora_A.weight" in tensors
            tensors[f"{PREFIX}{module}{'.base_layer' * wraps}.bias"] = weight.clone()
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, adapter / WEIGHTS)
    return folder, adapter, merged


def test_logits_are_those_of_the_merged_model(case: tuple[Path, Path, Path]) -> None:
    folder, adapter, merged = case
    known = sequences(VOCAB_SIZE, (1, 4), (19, 21))
    runner = load(folder, "cpu", enforce_eager=True, **LORA)
    lora_cases.use(runner, adapter, 2)
    found, expected = engine_logits(runner, known), transformers_logits(merged, known, "cpu")
    assert max_difference(found, expected) < TOLERANCE
    runner.state.adapter_S.fill_(0)  # type: ignore[union-attr]
    plain = transformers_logits(folder, known, "cpu")
    assert max_difference(engine_logits(runner, known), plain) < TOLERANCE
    assert max_difference(found, plain) > 100 * TOLERANCE


def test_ranks_have_their_parts(case: tuple[Path, Path, Path]) -> None:
    folder, adapter, merged = case
    known = sequences(VOCAB_SIZE, (1, 4), (19, 21))
    config = EngineConfig.from_options(str(folder), test_shards.options(2, **LORA))

    def logits(group: ThreadGroup) -> list[torch.Tensor]:
        runner = test_shards.load_rank(config, group)
        lora_cases.use(runner, adapter)
        return engine_logits(runner, known)

    expected = transformers_logits(merged, known, "cpu")
    for found in on_ranks(2, logits):
        assert max_difference(found, expected) < TOLERANCE


def test_biases_without_slots_are_refused(case: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, adapter, _ = case
    runner = load(folder, "cpu", enforce_eager=True, **{**LORA, "lora_biases": False})
    with pytest.raises(AdapterError, match=r"proj.*bias is not the bias of a linear layer.*option"):
        runner.check_adapter(1, adapter)
    runner = load(folder, "cpu", enforce_eager=True, **LORA)
    edits: dict[str, tuple[str, int, str]] = {
        "all": ("model.norm.bias", 64, "model.norm.bias is not the bias of a linear layer"),
        "none": ("model.layers.0.mlp.c_proj.bias", 56, "but bias is 'none'"),
        "lora_only": ("model.layers.0.mlp.c_proj.bias", 3, r"has the shape \[3\]: it must be"),
    }
    for bias, (name, size, error) in edits.items():
        (tmp_path / CONFIG).write_text(
            json.dumps({**json.loads((adapter / CONFIG).read_text()), "bias": bias})
        )
        save_file({PREFIX + name: torch.ones(size)}, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match=error):
            runner.check_adapter(2, tmp_path)
