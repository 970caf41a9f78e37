"""The checkpoint that `nanovllm quantize` reads, and where it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanovllm.models import registry
from nanovllm.models.param import Param
from nanovllm.models.schemes import UNQUANTIZED
from nanovllm.startup.config_file import transformers_config

Progress = Callable[[int], object]  # called with bytes of the checkpoint that are done


class Source(NamedTuple):
    """A checkpoint to be quantized: `matrices` has its parameters by the names of their tensors."""

    folder: Path
    hf: Any
    model: Any
    matrices: dict[str, Param]

    def files(self) -> list[Path]:
        single = self.folder / "model.safetensors"
        return [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))


def read_source(folder: Path) -> Source:
    """Raises ValueError for a checkpoint that is quantized, or that the engine does not run."""
    hf = transformers_config(folder / "config.json", {})
    model = registry.architecture(hf.architectures)(hf, dtype=torch.bfloat16, max_model_len=None)
    if model.scheme != UNQUANTIZED:
        raise ValueError(
            f"{folder} is quantized already ({model.scheme}): use the checkpoint that it was made "
            "from"
        )
    matrices = {}
    for params in model.declared:
        for param in params.values():
            if param.kind in ("linear", "experts") and not param.is_vocab:
                other = () if param.other_name is None else (param.other_name,)
                matrices.update(dict.fromkeys((*param.sources, *other), param))
    return Source(folder, hf, model, matrices)


def check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists: choose another folder, or remove it")


def total_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in source.files())
