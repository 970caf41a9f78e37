"""Experts load exactly in both spellings, or an error names the tensor that is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from nanovllm import LLM
from nanovllm.compile.trace import tensors
from nanovllm.models import loader as weights
from nanovllm.models import registry
from nanovllm.models.loader import CheckpointError
from nanovllm.models.model import Params
from tests.models.moe_cases import ARCHITECTURES, Case
from tests.models.routes import edit, stacked

Change = Callable[[dict[str, Tensor]], dict[str, Tensor] | None]
LAYER = "model.layers.1."


def load(folder: Path) -> Params:
    hf = AutoConfig.from_pretrained(folder)
    model = registry.architecture(hf.architectures)(hf, dtype=torch.float32)
    return weights.load(model, folder, weights.Target(torch.device("cpu")), int)


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Case(request.param, 3, 2, {"num_hidden_layers": 2}).save(tmp_path / "tiny")


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return Case("qwen3_moe", 3, 2, {"num_hidden_layers": 2}).save(tmp_path / "tiny")


def test_tensors_of_experts_arrive_where_they_belong(tiny: Path) -> None:
    """In either spelling: expert by expert, and gate's rows before up's."""
    stored = load_file(tiny / "model.safetensors")
    first = load(tiny)
    names = ("w1", "w3", "w2") if any("w1" in name for name in stored) else (
        "gate_proj", "up_proj", "down_proj"
    )  # fmt: skip
    for layer_idx, layer in enumerate(first.layers):
        for expert in range(3):
            gate, up, down = (
                next(
                    weight
                    for name, weight in stored.items()
                    if name.startswith(f"model.layers.{layer_idx}.")
                    and name.endswith(f".experts.{expert}.{matrix}.weight")
                )
                for matrix in names
            )
            assert torch.equal(layer.experts.gate_up_EGD[expert], torch.cat((gate, up)))
            assert torch.equal(layer.experts.down_EDF[expert], down)
    again = load(edit(tiny, stacked))
    for one, other in zip(tensors(first), tensors(again), strict=True):
        assert torch.equal(one, other)


def without(*names: str) -> Change:
    return lambda found: {name: x for name, x in found.items() if name not in names}


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda found: {**found, name: change(found[name]).contiguous()}


def shapes(actual: list[int], wanted: list[int]) -> str:
    return re.escape(f"has shape {actual}, but the config asks for {wanted}")


ONE = LAYER + "mlp.experts.2.up_proj.weight"
GATE_UP, DOWN = (LAYER + f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
ROUTER = LAYER + "mlp.gate.weight"
FIRST = LAYER + "mlp.experts.0.gate_proj.weight"


@pytest.mark.parametrize(
    ("is_stacked", "change", "message"),
    [
        (False, without(ONE), f"tensor {ONE} is missing"),
        (False, without(ROUTER), f"tensor {ROUTER} is missing"),
        (True, without(DOWN), f"neither {LAYER}mlp.experts.0.down_proj.weight nor {DOWN}"),
        (True, without(GATE_UP), f"neither {FIRST} nor {GATE_UP}"),
        (False, replaced(ONE, lambda x: x[:-1]), f"{ONE} {shapes([23, 40], [24, 40])}"),
        (False, replaced(ONE, lambda x: x.t()), f"{ONE} {shapes([40, 24], [24, 40])}"),
        (False, replaced(ROUTER, lambda x: x[:2]), f"{ROUTER} {shapes([2, 40], [3, 40])}"),
        (True, replaced(GATE_UP, lambda x: x[:2]), f"{GATE_UP} {shapes([2, 48, 40], [3, 48, 40])}"),
        (True, replaced(DOWN, lambda x: x.mT), f"{DOWN} {shapes([3, 24, 40], [3, 40, 24])}"),
        (
            False,
            replaced(ONE, lambda x: x.to(torch.int8)),
            f"{ONE} is stored as int8: it is quantized",
        ),
        (
            False,
            lambda found: {**found, ONE.replace(".2.", ".3."): found[ONE].clone()},
            r"1 tensor\(s\) that Qwen3MoeForCausalLM does not have, e.g. .*experts\.3\.up_proj",
        ),
        (
            False,
            lambda found: {**found, LAYER + "mlp.shared_expert_gate.weight": torch.ones(1, 40)},
            r"1 tensor\(s\) that Qwen3MoeForCausalLM does not have, e.g. .*shared_expert_gate",
        ),
    ],
)
def test_a_wrong_tensor_is_named(
    is_stacked: bool, change: Change, message: str, qwen: Path
) -> None:
    folder = edit(edit(qwen, stacked) if is_stacked else qwen, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


MATRICES = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("down_proj", "w2")}


def mixed(is_stacked: Callable[[str], bool]) -> Change:
    """The stacked tensors for which `is_stacked(name)`, and otherwise one for each expert."""

    def change(found: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen = {name: x for name, x in stacked(found).items() if is_stacked(name)}
        kept = found
        for name in chosen:
            layer, matrix = name.split("mlp.experts.")
            ends = tuple(f".{one}.weight" for one in MATRICES[matrix])
            kept = {
                other: x
                for other, x in kept.items()
                if not (other.startswith(layer) and ".experts." in other and other.endswith(ends))
            }
        return {**kept, **chosen}

    return change


@pytest.mark.parametrize(
    "is_stacked",
    [
        lambda name: ".0.mlp.experts" in name,
        lambda name: ".1.mlp.experts" in name,
        lambda name: name.endswith("experts.down_proj"),
        lambda name: name.endswith("1.mlp.experts.gate_up_proj"),
    ],
    ids=["first layer", "second layer", "down", "gate and up of one layer"],
)
def test_a_checkpoint_that_mixes_spellings_is_refused(
    is_stacked: Callable[[str], bool], tiny: Path
) -> None:
    message = r"mixes two spellings of experts: it has .*experts\..* and .*experts\..*"
    with pytest.raises(CheckpointError, match=message) as caught:
        load(edit(tiny, mixed(is_stacked)))
    stored = load_file(tiny / "model.safetensors")
    named = re.findall(r"model\.layers\.[\w.]+", str(caught.value))
    assert len(named) == 2 and set(named) <= set(stored)


def test_an_expert_in_both_spellings_is_refused(tiny: Path) -> None:
    both = edit(tiny, lambda found: {**{n: x.clone() for n, x in found.items()}, **stacked(found)})
    with pytest.raises(CheckpointError, match="mixes two spellings of experts"):
        load(both)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_int8_is_refused_for_experts(architecture: str, tmp_path: Path) -> None:
    folder = Case(architecture, 3, 2).save(tmp_path)
    with pytest.raises(
        ValueError, match=r"quantization 'int8' is not supported for a model with experts"
    ):
        LLM(str(folder), device="cpu", quantization="int8")
