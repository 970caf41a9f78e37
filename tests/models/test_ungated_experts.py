"""Experts without a gate: their kernels, the names of checkpoints, ranks, formats, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.kernels.triton import experts as triton_experts
from nanovllm.models import formats
from nanovllm.models.config import Compression
from nanovllm.models.experts import ungated
from nanovllm.models.experts.ungated import Ungated
from tests.models import test_shards
from tests.models.families import VOCAB_SIZE
from tests.models.harness import engine_logits, load, max_difference, sequences
from tests.models.mamba_cases import CASES

TOLERANCE = 1e-4
BY_NAME = {case.name: case for case in CASES}
KNOWN = sequences(VOCAB_SIZE, (19, 24))
# four layers are enough, and blocks of packed weights need round sizes
SMALL = {"layers_block_type": ["moe", "linear_attention", "full_attention", "moe"]}
ROUND = {**SMALL, "hidden_size": 64, "moe_intermediate_size": 64, "moe_latent_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BY_NAME["nemotron_h-experts"].save(tmp_path_factory.mktemp("experts"), **SMALL)


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("kernel", [formats.expert_linear, triton_experts.expert_linear])
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_kernels_give_the_formula(
    num_tokens: int, kernel: Any, is_parallel: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "expert_linear", kernel)
    x_TD = torch.randn(num_tokens, 40, device=device)
    weight_TK = torch.rand(num_tokens, 3, device=device)
    expert_TK = torch.stack([torch.randperm(6)[:3] for _ in range(num_tokens)])
    expert_TK = expert_TK.to(device, torch.int32)
    up = torch.randn(6, 29, 40, device=device) / 6
    down = torch.randn(6, 40, 29, device=device) / 6
    local_X = torch.tensor([-1, 0, 1, -1, 2, 3], dtype=torch.int32, device=device)
    place_X = local_X if is_parallel else torch.arange(6)
    residual_TD = torch.randn_like(x_TD)
    wanted = residual_TD.double()
    for t, chosen in enumerate(expert_TK.tolist()):
        for k, expert in enumerate(chosen):
            if (place := int(place_X[expert])) >= 0:
                inner = (up[place].double() @ x_TD[t].double()).clamp(min=0) ** 2
                wanted[t] += weight_TK[t, k].double() * (down[place].double() @ inner)
    stored = Ungated(up, down, local_X if is_parallel else None)
    found = ungated.apply(x_TD, weight_TK, expert_TK, stored, residual_TD)
    torch.testing.assert_close(found, wanted.float(), atol=1e-4, rtol=1e-4)


def test_one_tensor_for_all_experts_is_read(folder: Path, tmp_path: Path) -> None:
    """As transformers has them in memory, under its own prefix."""
    found = load_file(folder / "model.safetensors")
    joined = {
        name.replace("backbone.", "model."): one
        for name, one in found.items()
        if ".experts." not in name
    }
    for layer_idx in (0, 3):
        for matrix in ("up_proj", "down_proj"):
            names = [
                f"backbone.layers.{layer_idx}.mixer.experts.{expert}.{matrix}.weight"
                for expert in range(8)
            ]
            own = f"model.layers.{layer_idx}.mixer.experts.{matrix}"
            joined[own] = torch.stack([found[name] for name in names])
    save_file(joined, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    logits = [engine_logits(load(one, "cpu", enforce_eager=True), KNOWN) for one in
              (folder, tmp_path)]  # fmt: skip
    assert max_difference(*logits) == 0


@pytest.mark.parametrize("latent", [None, 24])
def test_two_ranks_with_whole_experts_give_the_logits_of_one(
    latent: int | None, tmp_path: Path
) -> None:
    folder = BY_NAME["nemotron_h-latent"].save(tmp_path / "m", moe_latent_size=latent)
    test_shards.check(folder, 2, VOCAB_SIZE, expert_parallel=True)


@pytest.mark.parametrize("quantization", ["int4", "fp8"])
def test_quantized_logits_are_those_of_the_stored_numbers(
    quantization: str, tmp_path: Path
) -> None:
    folder = BY_NAME["nemotron_h-latent"].save(tmp_path / "m", **ROUND)
    plain = load(folder, "cpu", enforce_eager=True)
    quantized = load(folder, "cpu", quantization=quantization, enforce_eager=True)
    before = engine_logits(plain, KNOWN)
    plain.steps = replace(plain.steps, params=real_values(quantized.params))
    found = engine_logits(quantized, KNOWN)
    assert max_difference(found, engine_logits(plain, KNOWN)) <= TOLERANCE
    assert max_difference(found, before) > TOLERANCE


def real_values(stored: Any) -> Any:
    """Parameters with the numbers that quantized weights stand for."""
    if hasattr(stored, "expert_linear"):
        return stored.rows(0).contiguous()
    if not isinstance(stored, tuple):
        return stored
    values = [real_values(one) for one in stored]
    return type(stored)(*values) if hasattr(stored, "_fields") else tuple(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_offload": "1MB"}, "experts of NemotronHForCausalLM have the activation 'relu2'"),
        ({"quantization": "int8"}, "'int8' is not supported for a model with experts"),
        (
            {"enable_lora": True, "lora_experts": True},
            "its experts have biases, or an activation that is not SiLU",
        ),
    ],
)
def test_what_needs_a_gate_is_refused(options: Any, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, "cpu", enforce_eager=True, **options)


def test_compressed_experts_are_refused(folder: Path) -> None:
    model = load(folder, "cpu", enforce_eager=True).model
    assert model.config.moe is not None
    moe = replace(model.config.moe, compression=Compression(4, torch.float32))
    compressed = replace(model, config=replace(model.config, moe=moe))
    with pytest.raises(ValueError, match="NemotronHForCausalLM, whose experts have no gate"):
        compressed.layer_params(compressed.config, compressed.layer_kinds[0], 0)
