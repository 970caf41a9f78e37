"""Checkpoints to parameters: safetensors only, every declared tensor present, none left over, each of the right shape."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.models.config import ModelConfig
from nanovllm.models.dense import Layer, Params
from nanovllm.models.formats.int8 import LINEAR_FIELDS, Int8Weight, quantize_int8
from nanovllm.models.params import Param

# Tensors that checkpoints carry and no forward pass reads.
IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias)$")
RANDOM_STD = 0.02


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not fit its config."""


def load(
    model: ModuleType,
    cfg: ModelConfig,
    folder: Path,
    device: torch.device,
    progress: Callable[[int], object],
    quantization: str | None = None,
) -> Params:
    """Read a checkpoint in transformers' layout into `cfg.dtype` on `device`; `progress(n)` after every n layers.

    With `quantization` "int8" the weights of linear layers become `Int8Weight`s as they are read. A tied embedding table
    stays as it is, since a row of it is looked up, not multiplied; the head is a quantized copy of it.

    Raises CheckpointError naming the tensor that is missing, left over or misshapen, or the file that is damaged.
    """
    files = _locate(folder)
    used: set[str] = set()

    def read(name: str, param: Param) -> Tensor:
        out = torch.empty(param.shape, dtype=cfg.dtype, device=device)
        for source, part in zip(param.sources, out.split(param.parts)):
            if source not in files:
                raise CheckpointError(f"{folder}: tensor {source} is missing")
            tensor = _read(files[source], source)
            if tensor.shape != part.shape:
                raise CheckpointError(
                    f"{folder}: tensor {source} has shape {list(tensor.shape)}, but the config asks for {list(part.shape)}"
                )
            part.copy_(tensor)
            used.add(source)
        return out

    params = _build(model, cfg, read, progress, quantization)
    ignored = {"lm_head.weight"} if cfg.tied_embeddings else set()
    extra = sorted(name for name in set(files) - used - ignored if not IGNORED.fullmatch(name))
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensor(s) that {cfg.architecture} does not have, e.g. {extra[0]}"
        )
    return params


def random(
    model: ModuleType,
    cfg: ModelConfig,
    device: torch.device,
    seed: int,
    progress: Callable[[int], object],
    quantization: str | None = None,
) -> Params:
    """Seeded weights: normal with standard deviation 0.02, norms at one, biases at zero."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, param: Param) -> Tensor:
        if "norm" in name:
            return torch.ones(param.shape, dtype=cfg.dtype, device=device)
        if "bias" in name:
            return torch.zeros(param.shape, dtype=cfg.dtype, device=device)
        return torch.empty(param.shape, dtype=cfg.dtype, device=device).normal_(
            0.0, RANDOM_STD, generator=generator
        )

    return _build(model, cfg, draw, progress, quantization)


def _build(
    model: ModuleType,
    cfg: ModelConfig,
    make: Callable[[str, Param], Tensor],
    progress: Callable[[int], object],
    quantization: str | None,
) -> Params:
    def stored(name: str, param: Param, weight: Tensor) -> Tensor | Int8Weight:
        if quantization is None or name not in LINEAR_FIELDS:
            return weight
        assert quantization == "int8", quantization
        return quantize_int8(", ".join(param.sources), weight)

    declared = model.outer_params(cfg)
    outer: dict[str, Any] = {
        name: stored(name, param, make(name, param)) for name, param in declared.items()
    }
    if cfg.tied_embeddings:
        outer["head_VD"] = stored("head_VD", declared["embed_VD"], outer["embed_VD"])
    layers = []
    for layer_idx in range(cfg.num_layers):
        declared = model.layer_params(cfg, layer_idx)
        made = {name: stored(name, param, make(name, param)) for name, param in declared.items()}
        layers.append(Layer(**{field: made.get(field) for field in Layer._fields}))  # type: ignore[arg-type]
        progress(1)
    return Params(layers=tuple(layers), **outer)


def _locate(folder: Path) -> dict[str, Path]:
    """Tensor name → file, in transformers' order: model.safetensors, the index file's map, else what all files list."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            located = {tensor: folder / name for tensor, name in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a readable index: {error}") from error
        missing = sorted({path.name for path in located.values() if not path.is_file()})
        if missing:
            raise CheckpointError(f"{folder}: the index names {missing[0]}, which is not there")
        return located
    # Other files beside model.safetensors hold the same weights under other names, or adapters.
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{folder}: no .safetensors file; other formats are not read, since they can run code"
        )
    return {name: path for path in paths for name in _opened(path).keys()}  # noqa: SIM118 (no mapping)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from error


def _read(path: Path, name: str) -> Tensor:
    try:
        with _opened(path) as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error
