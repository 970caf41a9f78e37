"""Adapters in PEFT's format for small checkpoints, and the same checkpoints with them merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.model import AdapterRows
from nanovllm.runner.runner import Runner

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
RANK, ALPHA = 4, 6
Named = Callable[[str], bool]


def every(module: str) -> bool:
    return True


def linear_layers(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """The linear layers of a checkpoint's decoder layers, and the shapes of their weights."""
    weights = load_file(checkpoint / "model.safetensors")
    return {
        name.removesuffix(".weight"): (weight.shape[0], weight.shape[1])
        for name, weight in weights.items()
        if weight.dim() == 2
        and ".layers." in name
        and name.endswith(("proj.weight", "_proj_qkvz.weight"))
    }


def save_adapter(
    folder: Path,
    checkpoint: Path,
    *,
    seed: int = 0,
    std: float = 0.3,
    named: Named = every,
    ranks: Mapping[str, int] | None = None,
    **fields: Any,
) -> Path:
    """A random adapter for the linear layers that are `named`. `ranks` are those of modules whose
    rank is not RANK, by the ends of their names; `fields` change its config."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module, (num_outputs, depth) in linear_layers(checkpoint).items():
        if named(module):
            rank = next((r for end, r in (ranks or {}).items() if module.endswith(end)), RANK)
            shapes = {"A": (rank, depth), "B": (num_outputs, rank)}
            for which, shape in shapes.items():
                drawn = torch.randn(*shape, generator=generator) * std
                tensors[f"{PREFIX}{module}.lora_{which}.weight"] = drawn
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    return folder


def save_merged(
    folder: Path,
    checkpoint: Path,
    adapter: Path,
    scale: Callable[[str, int], float] = lambda module, rank: ALPHA / rank,
) -> Path:
    """A copy of a checkpoint whose weights are W + scale(module, rank) · B · A."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(checkpoint / "model.safetensors")
    matrices = load_file(adapter / WEIGHTS)
    for name, a_XD in matrices.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b_OX = matrices[name.replace("lora_A", "lora_B")]
            delta_OD = (b_OX.double() @ a_XD.double()) * scale(module, len(a_XD))
            weight = weights[f"{module}.weight"]
            weights[f"{module}.weight"] = (weight.double() + delta_OD).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def grouped(numbers: Sequence[int], device: str = "cpu") -> AdapterRows:
    """The adapters of tokens, grouped."""
    adapter_T = torch.tensor(numbers, device=device)
    return AdapterRows(adapter_T, *ops.adapter_tiles(adapter_T))


def use(runner: Runner, adapter: Path, number: int = 1) -> None:
    """Load an adapter to a slot, and let all rows of the state have it."""
    runner.check_adapter(number, adapter)
    runner.read_adapter(number)
    runner.adapters.load(number, number)
    assert runner.state.adapter_S is not None
    runner.state.adapter_S.fill_(number)
