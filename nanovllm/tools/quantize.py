"""Writes a quantized copy of a checkpoint, which other engines read too.

Matrices of linear layers and of experts are quantized; tables, the head, routers and towers are
not. Files are written to a folder beside the target, DIR.partial, which gets its name at the end. A
run that was interrupted goes on after the last whole file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanovllm.models.checkpoint import Checkpoint, plain_name
from nanovllm.models.param import Param
from nanovllm.models.transposed import Orientations
from nanovllm.startup.config_file import read_object
from nanovllm.tools.quantize_source import Progress, Source, check_target
from nanovllm.tools.quantized_matrices import KINDS, Kind

PLAN, INDEX = "quantize.json", "model.safetensors.index.json"
# Files of weights, which are not copied.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", INDEX)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def write(source: Source, name: str, target: Path, progress: Progress) -> None:
    """Write the checkpoint in the format `name` of KINDS.

    Raises ValueError for a matrix that the format cannot store, and if `target` exists.
    """
    kind, work = KINDS[name], target.with_name(target.name + ".partial")
    check_target(target)
    plain, transposed = _check(source, kind)
    _begin(work, {"format": name, **_identity(source)})
    for path in source.files():
        done = work / path.name
        if not done.is_file():
            unfinished = work / f"{path.name}.unfinished"
            tensors = dict(_converted(source, kind, path, transposed))
            save_file(tensors, unfinished, {"format": "pt"})
            os.replace(unfinished, done)
        progress(path.stat().st_size)
    _write_index(work, source)
    for path in source.folder.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != "config.json":
            shutil.copyfile(path, work / path.name)
    config = read_object(source.folder / "config.json")
    config["quantization_config"] = kind.config(plain)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (work / PLAN).unlink()
    if target.exists():
        target.rmdir()
    work.rename(target)


def _check(source: Source, kind: Kind) -> tuple[list[str], set[str]]:
    """The modules that stay as they are, and the experts' tensors whose matrices are transposed.
    Raises ValueError before anything is written."""
    plain, transposed, orientations = {"lm_head"}, set(), Orientations()
    with Checkpoint(source.folder) as checkpoint:
        for path in source.files():
            for stored in _names(path):
                name = plain_name(stored)
                param, shape = source.matrices.get(name), checkpoint.shape(name)
                if param is not None:
                    is_stacked = len(shape) == 3 and param.may_be_transposed
                    if is_stacked and orientations.is_transposed(checkpoint, name, param):
                        transposed.add(name)
                        shape = (shape[0], shape[2], shape[1])
                    _check_matrix(stored, shape, param, kind)
                elif len(shape) == 2 and stored.endswith(".weight"):
                    plain.add(stored.removesuffix(".weight"))
    return sorted(plain), transposed


def _check_matrix(stored: str, shape: tuple[int, ...], param: Param, kind: Kind) -> None:
    if param.is_interleaved:
        raise ValueError(
            f"{stored} {list(shape)} has all experts in one tensor, and no format here has names "
            "for single ones of this model: it is not supported"
        )
    if len(shape) == 3 and shape != param.shape:
        raise ValueError(f"{stored} has shape {list(shape)}: only {list(param.shape)} is supported")
    if reason := kind.refusal((shape[-2], shape[-1])):
        raise ValueError(f"{stored} {list(shape)} cannot be stored so: {reason}")


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _converted(
    source: Source, kind: Kind, path: Path, transposed: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, with matrices quantized. Experts in one tensor get one for each."""
    for stored in _names(path):
        with safe_open(path, framework="pt") as file:
            weight, param = file.get_tensor(stored), source.matrices.get(plain_name(stored))
        if param is None:
            yield stored, weight
            continue
        if weight.dtype not in DTYPES:
            raise ValueError(f"{stored} is stored as {weight.dtype}: it is quantized already")
        if plain_name(stored) in transposed:
            weight = weight.mT
        prefix = stored.removesuffix(plain_name(stored).removeprefix("model."))
        for name, matrix in _matrices(stored, weight, param, prefix):
            for end, tensor in kind.matrix(name, matrix).items():
                yield name.removesuffix("weight") + end, tensor.contiguous()


def _matrices(
    stored: str, weight: Tensor, param: Param, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    if weight.dim() == 2:
        yield stored, weight
        return
    rows = weight.flatten(0, 1).split(param.parts)
    for source, matrix in zip(param.sources, rows, strict=True):
        yield prefix + source.removeprefix("model."), matrix


def _identity(source: Source) -> dict[str, Any]:
    """What a run that goes on must find unchanged."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files()}
    return {"model": str(source.folder.resolve()), "files": files}


def _begin(work: Path, plan: dict[str, Any]) -> None:
    """The folder for unfinished work; what another plan left there is removed."""
    path = work / PLAN
    if work.is_dir() and (not path.is_file() or json.loads(path.read_bytes()) != plan):
        if not path.is_file() and any(work.iterdir()):
            raise ValueError(f"{work} exists and is not of nanovllm quantize: remove it")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan), encoding="utf-8")


def _write_index(work: Path, source: Source) -> None:
    files = [work / path.name for path in source.files()]
    if len(files) == 1 and files[0].name == "model.safetensors":
        return
    weight_map, size = {}, 0
    for path in files:
        size += path.stat().st_size
        weight_map.update(dict.fromkeys(_names(path), path.name))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
