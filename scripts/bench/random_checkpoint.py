"""Writes checkpoints of random weights in transformers' layout, for benchmarks of reading them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from nanovllm.models import registry
from nanovllm.models.model import Model, Param

EMBEDDED = Path(__file__).resolve().parents[2] / "nanovllm" / "assets" / "tiny-qwen3"
SHARD_BYTES = 5_000_000_000  # as large as the files of published checkpoints


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    seed: int,
    shard_bytes: int = SHARD_BYTES,
    *,
    stacks_experts: bool = False,
) -> Path:
    """Random weights in files of up to `shard_bytes`, with an index, config.json, and the tokenizer
    of the embedded model; returns the folder, which must not exist.

    Each expert has separate tensors, as in published checkpoints; with `stacks_experts` a layer's
    experts are in two, as transformers 5 writes them.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    dtype = getattr(torch, str(config.get("dtype") or config["torch_dtype"]).removeprefix("torch."))
    model = registry.architecture(hf.architectures)(hf, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(1 << 24).normal_(0.0, 0.02, generator=generator).to(dtype)
    weight_map: dict[str, str] = {}
    for shard in _shards(model, shard_bytes, stacks_experts):
        path = folder / f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file({name: _drawn(pool, shape, generator) for name, shape in shard.items()}, path)
        weight_map |= dict.fromkeys(shard, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _drawn(pool: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random slice of the pool: drawing all numbers would take longer than writing them."""
    size, first = math.prod(shape), int(torch.randint(1 << 16, (), generator=generator))
    if first + size > pool.numel():
        pool = pool.repeat(-(-(first + size) // pool.numel()))
    return pool[first : first + size].clone().view(shape)


def _shards(
    model: Model, shard_bytes: int, stacks_experts: bool
) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of the tensors of each file."""
    shard: dict[str, tuple[int, ...]] = {}
    num_bytes = 0
    for group in model.declared:
        tensors = (pair for param in group.values() for pair in _shapes(param, stacks_experts))
        for name, shape in tensors:
            num_bytes += math.prod(shape) * model.config.dtype.itemsize
            if shard and num_bytes > shard_bytes:
                yield shard
                shard, num_bytes = {}, math.prod(shape) * model.config.dtype.itemsize
            shard[name] = shape
    yield shard


def _shapes(param: Param, stacks_experts: bool) -> list[tuple[str, tuple[int, ...]]]:
    """The name and shape of each of a parameter's tensors."""
    if param.kind != "experts":
        return [(name, (rows, *param.shape[1:])) for name, rows in zip(param.sources, param.parts)]
    if stacks_experts:
        assert param.other_name is not None
        return [(param.other_name, param.shape)]
    return [(name, (rows, param.shape[-1])) for name, rows in zip(param.sources, param.parts)]
