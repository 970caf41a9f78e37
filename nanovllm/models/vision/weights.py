"""Reads the weights of a vision or audio encoder from a checkpoint, or draws them at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nanovllm.models.checkpoint import Checkpoint, CheckpointError
from nanovllm.models.loader import RANDOM_STD, Target
from nanovllm.models.model import Model, Param, Params
from nanovllm.models.pooling import PoolWeights

Weights = TypeVar("Weights", covariant=True)
AnyParams = TypeVar("AnyParams", Params, PoolWeights)


class AnyTower(Protocol[Weights]):
    """The common interface of vision and audio encoders (`Model.towers`)."""

    @property
    def config(self) -> Any: ...
    @property
    def prefixes(self) -> tuple[str, ...]: ...
    @property
    def unused(self) -> tuple[str, ...]: ...
    @property
    def modules(self) -> tuple[str, ...]: ...
    def build(self, make: Callable[[Param], Tensor]) -> Weights: ...


def load(tower: AnyTower[Weights], folder: Path, target: Target) -> Weights:
    """Read a tower in its dtype; every rank has all of it, so `target.shard` is not used.

    Raises CheckpointError naming the tensor that is missing, left over, misshapen or quantized, or
    the file that is missing or damaged.
    """
    with Checkpoint(folder, target.buffer) as checkpoint:
        prefix = _prefix(checkpoint, tower.prefixes, tower.modules)
        own, unused = (
            tuple(prefix + name for name in names) for names in (tower.modules, tower.unused)
        )
        left = {name for name in checkpoint if name.startswith(own) and not name.startswith(unused)}

        def read(param: Param) -> Tensor:
            out = torch.empty(param.shape, dtype=tower.config.dtype, device=target.device)
            names = [prefix + source for source in param.sources]
            if param.source_shape is None:
                checkpoint.read(zip(names, out.split(param.parts)))
            else:
                sources = [out.new_empty(param.source_shape) for _ in names]
                checkpoint.read(zip(names, sources))
                rows = out.zero_() if param.source_shape else out.view(-1)
                for part, source in zip(rows.split(param.parts), sources):
                    part[tuple(map(slice, source.shape))] = source
            left.difference_update(names)
            return target.place(out)

        weights = tower.build(read)
    if left:
        raise CheckpointError(
            f"{folder}: {len(left)} tensor(s) that the tower of {tower.config.architecture} "
            f"does not have, e.g. {min(left)}"
        )
    return weights


def random(tower: AnyTower[Weights], target: Target, seed: int) -> Weights:
    """Seeded weights: normal with standard deviation 0.02, norms at one, biases at zero."""
    generator = torch.Generator(target.device).manual_seed(seed)

    def draw(param: Param) -> Tensor:
        weight = torch.empty(param.shape, dtype=tower.config.dtype, device=target.device)
        if param.kind in ("norm", "bias"):
            return target.place(weight.fill_(float(param.kind == "norm")))
        return target.place(weight.normal_(0.0, RANDOM_STD, generator=generator))

    return tower.build(draw)


def with_towers(params: AnyParams, model: Model, make: Callable[[AnyTower[Any]], Any]) -> AnyParams:
    """The parameters of a model with those that `make` gives for its towers."""
    return params._replace(**{name: make(tower) for name, tower in model.towers.items()})


def _prefix(checkpoint: Checkpoint, prefixes: tuple[str, ...], modules: tuple[str, ...]) -> str:
    """Raises CheckpointError if a checkpoint has no tower, or mixes two spellings of one."""
    found = [
        prefix
        for prefix in prefixes
        if any(name.startswith(prefix + modules[0]) for name in checkpoint)
    ]
    if len(found) != 1:
        what = "mixes two spellings of" if found else "has no tensors of"
        raise CheckpointError(f"{checkpoint.folder} {what} a tower ({', '.join(prefixes)})")
    return found[0]
