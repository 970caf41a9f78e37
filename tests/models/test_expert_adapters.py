"""Adapters of experts give the logits of merged models: of single linear layers, and of parameters
with all experts as PEFT writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.models.lora.peft_config import AdapterError
from nanovllm.startup.resolve import resolve_without_weights
from tests.models import lora_cases, moe_cases, test_shards
from tests.models.families import FAMILIES
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits
from tests.models.lora_cases import CONFIG, PREFIX, WEIGHTS
from tests.models.thread_ranks import ThreadGroup, on_ranks

TOLERANCE = 1e-4
RANK, ALPHA = 2, 3
LENGTHS = ((1, 4), (19, 21))
LORA: dict[str, Any] = {
    "enable_lora": True, "max_loras": 2, "max_lora_rank": 3, "lora_experts": True
}  # fmt: skip
EXPERTS = "model.layers.{}.mlp.experts"


def is_of_experts(module: str) -> bool:
    return ".experts." in module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 1 is dense."""
    case = moe_cases.Case("qwen3_moe", 4, 2, {"mlp_only_layers": [1]})
    return case.save(tmp_path_factory.mktemp("model"))


def save_parameters(adapter: Path, folder: Path) -> Path:
    """Adapters of both parameters of each layer's experts, as PEFT 0.21 nests and names them."""
    weights = load_file(folder / "model.safetensors")
    sizes = {name: tuple(one.shape) for name, one in weights.items()}
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for layer in (0, 2):
        module = EXPERTS.format(layer)
        width, depth = sizes[f"{module}.0.gate_proj.weight"]
        num = sum(name.startswith(module) for name in sizes) // 3
        for name, (num_inputs, num_outputs) in {
            module: (depth, 2 * width), f"{module}.base_layer": (width, depth)
        }.items():  # fmt: skip
            shapes = {"A": (num * RANK, num_inputs), "B": (num_outputs, RANK * num)}
            for which, shape in shapes.items():
                drawn = 0.2 * torch.randn(*shape, generator=generator)
                tensors[f"{PREFIX}{name}.lora_{which}.weight"] = drawn
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS)
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"],
    }  # fmt: skip
    (adapter / CONFIG).write_text(json.dumps(config))
    return adapter


def merge_parameters(merged: Path, folder: Path, adapter: Path) -> Path:
    """A checkpoint with PEFT's `get_delta_weight` of each parameter added to its experts."""
    shutil.copytree(folder, merged)
    weights, matrices = load_file(merged / "model.safetensors"), load_file(adapter / WEIGHTS)
    for key, a_RD in matrices.items():
        if ".lora_B." in key:
            continue
        b_OR = matrices[key.replace("lora_A", "lora_B")]
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        is_down = module.endswith(".base_layer")
        module = module.removesuffix(".base_layer")
        num = sum(name.startswith(module) for name in weights) // 3
        a_ERD = a_RD.double().reshape(num, -1, a_RD.shape[1])
        b_ORE = b_OR.double().reshape(len(b_OR), -1, num)
        delta_EOD = torch.einsum("o r e, e r i -> e o i", b_ORE, a_ERD) * ALPHA / RANK
        for expert, delta_OD in enumerate(delta_EOD):
            names = ["down_proj"] if is_down else ["gate_proj", "up_proj"]
            for name, part in zip(names, delta_OD.chunk(len(names))):
                weight = weights[f"{module}.{expert}.{name}.weight"]
                weight += part.to(weight.dtype)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return merged


@pytest.fixture(scope="module", params=["layers", "parameters"])
def case(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An adapter, and the model with it merged."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "parameters":
        adapter = save_parameters(root / "adapter", folder)
        return adapter, merge_parameters(root / "merged", folder, adapter)
    adapter = lora_cases.save_adapter(
        root / "adapter", folder, std=0.2, named=is_of_experts, r=RANK,
        ranks={"proj": RANK}, lora_alpha=ALPHA,
    )  # fmt: skip
    merged = lora_cases.save_merged(root / "merged", folder, adapter, lambda *at: ALPHA / RANK)
    return adapter, merged


def test_logits_are_those_of_the_merged_model(folder: Path, case: tuple[Path, Path]) -> None:
    adapter, merged = case
    known = sequences(moe_cases.VOCAB_SIZE, *LENGTHS)
    runner = load(folder, "cpu", enforce_eager=True, **LORA)
    lora_cases.use(runner, adapter, 2)
    found, expected = engine_logits(runner, known), transformers_logits(merged, known, "cpu")
    assert max_difference(found, expected) < TOLERANCE
    assert max_difference(found, transformers_logits(folder, known, "cpu")) > 100 * TOLERANCE


@pytest.mark.parametrize("expert_parallel", [True, False])
def test_ranks_have_their_parts(
    expert_parallel: bool, folder: Path, case: tuple[Path, Path]
) -> None:
    adapter, merged = case
    known = sequences(moe_cases.VOCAB_SIZE, *LENGTHS)
    options = test_shards.options(2, **LORA, expert_parallel=expert_parallel)
    config = EngineConfig.from_options(str(folder), options)

    def logits(group: ThreadGroup) -> list[torch.Tensor]:
        runner = test_shards.load_rank(config, group)
        lora_cases.use(runner, adapter)
        return engine_logits(runner, known)

    expected = transformers_logits(merged, known, "cpu")
    for found in on_ranks(2, logits):
        assert max_difference(found, expected) < TOLERANCE


def test_an_engine_without_slots_for_experts_names_the_option(
    folder: Path, case: tuple[Path, Path]
) -> None:
    runner = load(folder, "cpu", enforce_eager=True, **{**LORA, "lora_experts": False})
    with pytest.raises(AdapterError, match="those of experts need the option lora_experts=True"):
        runner.check_adapter(1, case[0])


@pytest.mark.parametrize(
    ("name", "why"),
    [("smollm3", "it has no experts"), ("gpt-oss", "its experts have biases, or an activation")],
)
def test_experts_that_can_have_none_are_refused(name: str, why: str, tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == name)
    options = {"device": "cpu", "dtype": "float32", **LORA}
    config = EngineConfig.from_options(str(family.save(tmp_path)), options)
    with pytest.raises(ValueError, match=f"lora_experts=True is not supported for .*: {why}"):
        resolve_without_weights(config)
