"""Loads a model's parameters from safetensors files, or draws them at random."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.models.experts.stacked import Stacked
from nanovllm.models.formats import FORMATS, PLAIN, Weight
from nanovllm.models.interface import LayerKind, Model, Param, Params

# Checkpoint tensors that no forward pass reads.
IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias)$")
RANDOM_STD = 0.02
# Other dtypes, integers and fp8, are parts of a number whose scale is a tensor of its own.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS_AT_ONCE = 4096  # when two tables are compared

Progress = Callable[[int], object]  # called with the number of layers that were added
Place = Callable[[Tensor], Tensor]  # moves a weight as stored to memory of its own


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not fit its config."""


def _in_place(tensor: Tensor) -> Tensor:
    return tensor


def load(
    model: Model,
    folder: Path,
    device: torch.device,
    progress: Progress,
    weight_format: str = PLAIN,
    place: Place = _in_place,
) -> Params:
    """Read a checkpoint in transformers' layout, in the model's dtype, to `device`.

    The weights of linear layers are converted to `weight_format` as they are read. A tied embedding
    table stays plain, since its rows are looked up; the head is a converted copy of it. Calls
    `progress(n)` after every n layers. `place` takes each tensor once, in an order that depends on
    the model and the format alone, and returns the one to use.

    Raises CheckpointError naming the tensor that is missing, left over, misshapen or quantized, or
    the file that is damaged.
    """
    files = _locate(folder)
    used: set[str] = set()

    spellings: dict[bool, str] = {}  # of experts: one tensor for all, or one for each

    def read(param: Param) -> Tensor:
        out = torch.empty(param.shape, dtype=model.config.dtype, device=device)
        rows = out if out.dim() < 3 else out.flatten(0, -2)
        sources, parts = param.sources, rows.split(param.parts)
        is_other = param.other_name is not None and param.other_name in files
        if param.other_name is not None and is_other:
            sources, parts = (param.other_name,), (out,)
        if param.kind == "experts":
            spellings[is_other] = sources[0]
            either = (source for source in param.sources if is_other and source in files)
            if both := next(either, None) or (len(spellings) > 1 and spellings[not is_other]):
                raise CheckpointError(
                    f"{folder} mixes two spellings of experts: it has {sources[0]} and {both}"
                )
        for source, part in zip(sources, parts):
            _copy(part, source, files, folder)
            used.add(source)
        return out

    params = build(model, read, progress, weight_format, place)
    ignored = {HEAD} if model.config.tied_embeddings else set()
    extra = sorted(name for name in set(files) - used - ignored if not IGNORED.fullmatch(name))
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensor(s) that {model.config.architecture} does not have, "
            f"e.g. {extra[0]}"
        )
    return params


def _copy(out: Tensor, source: str, files: dict[str, Path], folder: Path) -> None:
    """Copy the tensor `source` of a checkpoint to `out`, which has the shape that it must have."""
    if source not in files:
        raise CheckpointError(f"{folder}: tensor {source} is missing")
    tensor = _read(files[source], source)
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{folder}: tensor {source} is stored as {str(tensor.dtype).removeprefix('torch.')}: "
            "quantized checkpoints are not supported"
        )
    if tensor.shape != out.shape:
        raise CheckpointError(
            f"{folder}: tensor {source} has shape {list(tensor.shape)}, but the config asks for "
            f"{list(out.shape)}"
        )
    out.copy_(tensor)


def has_own_head(folder: Path, dtype: torch.dtype) -> bool:
    """True if the checkpoint has a head whose values, in `dtype`, differ from the embedding table.

    Where that is so, transformers does not tie them, whatever the config says. Reads headers alone
    if no head is stored, and otherwise up to the first difference. False without weights.
    """
    if not any(folder.glob("*.safetensors")):
        return False
    files = _locate(folder)
    if not {TABLE, HEAD} <= set(files):
        return False
    try:
        with _opened(files[TABLE]) as one, _opened(files[HEAD]) as other:
            table, head = one.get_slice(TABLE), other.get_slice(HEAD)
            if table.get_shape() != head.get_shape():
                return True
            num_rows = table.get_shape()[0]
            for start in range(0, num_rows, ROWS_AT_ONCE):
                rows = slice(start, min(start + ROWS_AT_ONCE, num_rows))
                if not torch.equal(table[rows].to(dtype), head[rows].to(dtype)):
                    return True
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: {TABLE} or {HEAD} cannot be read: {error}") from error
    return False


def random(
    model: Model,
    device: torch.device,
    seed: int,
    progress: Progress,
    weight_format: str = PLAIN,
    place: Place = _in_place,
) -> Params:
    """Seeded weights: normal with standard deviation 0.02, norms at one, biases at zero.

    `place` is that of `load`.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(param: Param) -> Tensor:
        weight = torch.empty(param.shape, dtype=model.config.dtype, device=device)
        if param.kind in ("norm", "bias"):
            return weight.fill_(float(param.kind == "norm"))
        return weight.normal_(0.0, RANDOM_STD, generator=generator)

    return build(model, draw, progress, weight_format, place)


def build(
    model: Model,
    make: Callable[[Param], Tensor],
    progress: Progress,
    weight_format: str,
    place: Place = _in_place,
) -> Params:
    """The parameters that `make` gives, with the weights of linear layers in `weight_format`."""

    def stored(param: Param, weight: Tensor) -> Weight:
        return FORMATS[weight_format].store(", ".join(param.sources), weight)

    def placed(weight: Weight) -> Weight:
        return place(weight) if isinstance(weight, Tensor) else type(weight)(*map(place, weight))

    def made(declared: dict[str, Param]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, param in declared.items():
            weight = make(param)
            values[name] = placed(stored(param, weight) if param.kind == "linear" else weight)
        return values

    def made_layer(declared: dict[str, Param], kind: LayerKind) -> Any:
        layer_type = model.layer_type(kind)
        values = dict.fromkeys(layer_type._fields) | made(declared)
        if kind.sparse:
            values["experts"] = Stacked(*(values.pop(name) for name in Stacked._fields))
        return layer_type(**values)

    outer_params, *layer_params = model.declared
    outer = made(outer_params)
    if model.config.tied_embeddings:
        head = stored(outer_params["embed_VD"], outer["embed_VD"])
        outer["head_VD"] = head if head is outer["embed_VD"] else placed(head)
    layers = []
    for declared, kind in zip(layer_params, model.layer_kinds):
        layers.append(made_layer(declared, kind))
        progress(1)
    return Params(layers=tuple(layers), **outer)


def _locate(folder: Path) -> dict[str, Path]:
    """The file of each tensor: model.safetensors, else by the index, else all files."""
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
    # Files beside model.safetensors hold the same weights under other names, or adapters.
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
