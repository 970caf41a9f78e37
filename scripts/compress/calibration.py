"""Calibration data: the inputs of a model's experts while it answers prompts.

A safetensors file. For expert j of layer i it has `layer_i_expert_j_x`, inputs [N, D] in the
model's dtype, and `layer_i_expert_j_weight`, the router's weights of these inputs, fp32 [N]. An
expert without routed tokens has none. The header has the architecture and sizes of the model.

T tokens | K experts per token | P pairs of token and expert | N inputs of an expert | D hidden
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compress.output import save_file
from compress.source import Source
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.kernels import ops
from nanovllm.models.experts.offloaded import Offloaded
from nanovllm.models.experts.stacked import Stacked
from nanovllm.models.model import Params

HEADER = "calibration"
MIN_INPUTS = 64  # an expert with fewer gets as many of other experts'


class Inputs(NamedTuple):
    x_ND: Tensor
    weight_N: Tensor


class Group:
    """A uniform sample of at most `cap` of the inputs of one expert."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # inputs, weights, random keys
        self._num_kept = 0
        self.num_seen = 0

    def add(self, inputs: Inputs, key_N: Tensor) -> None:
        """`key_N` are random numbers: the inputs with the smallest ones are kept."""
        num = len(key_N)
        self.num_seen += num
        self._parts.append((*inputs, key_N))
        self._num_kept += num
        if self._num_kept > 2 * self._cap:
            self._shrink()

    def inputs(self) -> Inputs:
        self._shrink()
        x_ND, weight_N, _ = self._parts[0]
        return Inputs(x_ND, weight_N)

    def _shrink(self) -> None:
        x_ND, weight_N, key_N = (torch.cat(parts) for parts in zip(*self._parts))
        kept = key_N.argsort()[: self._cap]
        self._parts = [(x_ND[kept], weight_N[kept], key_N[kept])]
        self._num_kept = len(kept)


class Recorder(TorchDispatchMode):
    """Samples the inputs of experts in every step of an eager engine that runs under it.

    `groups` has a `Group` for each (layer, expert) that got an input.
    """

    def __init__(self, params: Params, cap: int, seed: int = 0) -> None:
        super().__init__()
        self.groups: dict[tuple[int, int], Group] = {}
        self._cap = cap
        self._generator = torch.Generator().manual_seed(seed)
        self._layer_of = {
            _mark(layer.experts).data_ptr(): layer_idx
            for layer_idx, layer in enumerate(params.layers)
            if hasattr(layer, "experts")
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (ops.experts, ops.offloaded_experts):
            pointers = (arg.data_ptr() for arg in args if isinstance(arg, Tensor))
            (layer_idx,) = {self._layer_of[one] for one in pointers if one in self._layer_of}
            self._add(layer_idx, *args[:3])
        return func(*args, **(kwargs or {}))

    def _add(self, layer_idx: int, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> None:
        x_TD, expert_P = x_TD.cpu(), expert_TK.flatten().cpu()
        weight_P = weight_TK.flatten().cpu()
        order_P = expert_P.argsort(stable=True)
        token_P, weight_P = order_P // expert_TK.shape[1], weight_P[order_P]
        key_P = torch.rand(len(order_P), generator=self._generator)
        experts, counts = expert_P.unique(return_counts=True)
        sizes = counts.tolist()
        parts = zip(token_P.split(sizes), weight_P.split(sizes), key_P.split(sizes))
        for expert, (token_N, weight_N, key_N) in zip(experts.tolist(), parts):
            group = self.groups.setdefault((layer_idx, expert), Group(self._cap))
            group.add(Inputs(x_TD[token_N], weight_N.clone()), key_N.clone())


def save(
    path: Path, source: Source, groups: Mapping[tuple[int, int], Group], **details: object
) -> None:
    """Write the file. `details` go to its header beside the model's architecture and sizes."""
    tensors: dict[str, Tensor] = {}
    for (layer_idx, expert), group in groups.items():
        inputs, name = group.inputs(), _name(layer_idx, expert)
        tensors |= {f"{name}_x": inputs.x_ND.contiguous(), f"{name}_weight": inputs.weight_N}
    cfg = source.model.config
    header = {
        "architecture": cfg.architecture,
        "hidden_size": cfg.hidden_size,
        "num_layers": cfg.num_layers,
        "num_experts": source.moe.num_experts,
        **details,
    }
    save_file(tensors, path, {HEADER: json.dumps(header)})


def check_target(path: Path) -> None:
    """Raise ValueError unless calibration data can be written to `path` without overwriting
    others."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write")
    if path.exists():
        try:
            _header(path)
        except ValueError as error:
            raise ValueError(f"{error}. It would be overwritten: name another file") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written")


def _header(path: Path) -> dict[str, Any]:
    """The file's header. Raises ValueError, with the path, for another kind of file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged or not calibration data: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: damaged or not calibration data: the header is {header!r}")
    return header


class Calibration:
    """Calibration data in a file, read expert by expert."""

    def __init__(self, path: Path, source: Source) -> None:
        """Raises ValueError, with the path, if it cannot be read or is of another model."""
        if not path.is_file():
            raise ValueError(
                f"{path}: no calibration data: scripts/collect_moe_calib.py collects them"
            )
        header = _header(path)
        self._file = safe_open(path, framework="pt")
        cfg = source.model.config
        wanted = {
            "architecture": cfg.architecture,
            "hidden_size": cfg.hidden_size,
            "num_layers": cfg.num_layers,
            "num_experts": source.moe.num_experts,
        }
        for name, value in wanted.items():
            if header.get(name) != value:
                raise ValueError(
                    f"{path}: {name} is {header.get(name)!r}, but the checkpoint has {value!r}"
                )
        self._path, self._names = path, set(self._file.keys())
        self._num_experts, self._hidden_size = source.moe.num_experts, cfg.hidden_size

    def layer_inputs(self, layer_idx: int) -> list[Inputs]:
        """The inputs of each expert of a layer.

        An expert with few inputs gets some of the other experts' too. Raises ValueError for a layer
        without inputs.
        """
        own = [self._inputs(layer_idx, expert) for expert in range(self._num_experts)]
        pooled = Inputs(*(torch.cat(parts) for parts in zip(*own)))
        if not len(pooled.weight_N):
            raise ValueError(
                f"{self._path} has no inputs of layer {layer_idx}: collect them with more prompts"
            )
        stride = -(-len(pooled.weight_N) // MIN_INPUTS)
        some = Inputs(*(part[::stride] for part in pooled))
        return [
            inputs if len(inputs.weight_N) >= MIN_INPUTS
            else Inputs(*(torch.cat(parts) for parts in zip(inputs, some)))
            for inputs in own
        ]  # fmt: skip

    def _inputs(self, layer_idx: int, expert: int) -> Inputs:
        name = _name(layer_idx, expert)
        if f"{name}_x" not in self._names:
            return Inputs(torch.empty(0, self._hidden_size), torch.empty(0))
        try:
            x_ND, weight_N = (self._file.get_tensor(f"{name}_{part}") for part in ("x", "weight"))
        except SafetensorError as error:
            raise ValueError(f"{self._path}: inputs of {name} cannot be read: {error}") from error
        if x_ND.shape != (*weight_N.shape, self._hidden_size) or weight_N.dim() != 1:
            raise ValueError(
                f"{self._path}: inputs of {name} have the shapes {list(x_ND.shape)} and "
                f"{list(weight_N.shape)}: they must be [N, {self._hidden_size}] and [N]"
            )
        if not (x_ND.isfinite().all() and weight_N.isfinite().all()):
            raise ValueError(f"{self._path}: inputs of {name} are NaN or infinite")
        return Inputs(x_ND, weight_N)


def _mark(stored: Stacked | Offloaded) -> Tensor:
    """A tensor that identifies this layer's experts in every call."""
    return stored.gate_up_EGD if isinstance(stored, Stacked) else stored.first_1


def _name(layer_idx: int, expert: int) -> str:
    return f"layer_{layer_idx}_expert_{expert}"
