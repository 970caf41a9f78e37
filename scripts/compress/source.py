"""The experts of a checkpoint, read layer by layer.

E experts | D hidden | F expert width
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm import hub
from nanovllm.models import registry, svd_experts
from nanovllm.models.checkpoint import Checkpoint
from nanovllm.models.config import MoeConfig
from nanovllm.models.experts.stacked import Stacked
from nanovllm.models.loader import Target, WeightReader
from nanovllm.models.model import Model
from nanovllm.startup.config_file import transformers_config


class LayerExperts(NamedTuple):
    """The experts of one layer, as stored. An expert computes down(silu(gate(x)) · up(x))."""

    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor

    def of_kind(self, kind: str) -> Tensor:
        """All matrices of one of `svd_experts.KINDS`, [E, outputs, inputs]."""
        return self[svd_experts.KINDS.index(kind)]


@dataclass(frozen=True)
class Source:
    """A checkpoint with experts that are not compressed."""

    folder: Path
    model: Model

    @property
    def moe(self) -> MoeConfig:
        assert self.model.config.moe is not None
        return self.model.config.moe

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        return tuple(idx for idx, kind in enumerate(self.model.layer_kinds) if kind.sparse)

    def num_inputs(self, kind: str) -> int:
        """The length of the vectors that matrices of a kind are multiplied with."""
        return self.moe.expert_size if kind == svd_experts.DOWN else self.model.config.hidden_size

    def read(self, layer_idx: int, device: torch.device) -> LayerExperts:
        """The experts of a sparse layer, in the checkpoint's dtype.

        Raises CheckpointError, and ValueError for weights that are not finite.
        """
        cfg, kind = self.model.config, self.model.layer_kinds[layer_idx]
        declared = self.model.layer_params(cfg, kind, layer_idx)
        with Checkpoint(self.folder) as checkpoint:
            reader = WeightReader(cfg, checkpoint, Target(device))
            gate_up_EGD, down_EDF = (reader.read(declared[name]) for name in Stacked._fields)
        if not (gate_up_EGD.isfinite().all() and down_EDF.isfinite().all()):
            raise ValueError(
                f"{self.folder}: experts of layer {layer_idx} have weights that are NaN or infinite"
            )
        return LayerExperts(*gate_up_EGD.chunk(2, dim=1), down_EDF)

    def fingerprint(self) -> str:
        """A short digest of the names, sizes and times of the checkpoint's files."""
        return fingerprint(*self.folder.glob("*.safetensors"), self.folder / "config.json")


def open_source(name: str) -> Source:
    """The checkpoint of an embedded model, a folder or a Hub id.

    Raises ValueError for one without experts.
    """
    folder = hub.resolve(name)
    hf = transformers_config(folder / "config.json", {})
    dtype = getattr(hf, "dtype", None) or torch.float32
    model = registry.architecture(hf.architectures)(hf, dtype=dtype)
    if model.config.moe is None:
        raise ValueError(f"{folder}: {model.config.architecture} has no experts")
    return Source(folder, model)


def fingerprint(*paths: Path) -> str:
    """A short digest of the names, sizes and times of files."""
    total = hashlib.sha256()
    for path in sorted(paths):
        stat = path.stat()
        total.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return total.hexdigest()[:16]


def check_rank(source: Source, rank: int) -> None:
    """Raises ValueError for a rank that no basis of the checkpoint can have."""
    largest = svd_experts.max_rank(source.model.config)
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank is {rank}: it must be from 1 to {largest}, the number of inputs of the "
            "narrowest matrix of an expert"
        )


def choose_device(name: str) -> torch.device:
    """Raises ValueError for a device that torch does not find."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # "meta" computes nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not available: {reason}") from error
    return torch.device(name)
