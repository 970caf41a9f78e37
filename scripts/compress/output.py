"""Writes a folder of compressed experts so that an interrupted run continues where it stopped.

A layer is finished when its bases are written, after the files of its experts. The bases of
finished layers are kept in a separate folder until all layers are finished. metadata.json comes
last: without it, no engine uses the folder. Files of a run with other settings are deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_privately
from torch import Tensor

from nanovllm.models import svd_experts
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.svd_experts import (
    BASES,
    FINISHED,
    METADATA,
    OWN,
    PROGRESS,
    Metadata,
    basis_name,
    expert_name,
)


def save_file(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the process's umask."""
    save_privately(tensors, path, header)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


class Output:
    def __init__(self, folder: Path, metadata: Metadata, sparse_layers: Sequence[int]) -> None:
        """Keeps files of a run with the same metadata in `folder`, and deletes others.

        Raises ValueError for a folder with files that such runs do not write.
        """
        self.folder, self.metadata = folder, metadata
        self._sparse_layers = sparse_layers
        self._dtype = svd_experts.DTYPES[metadata.dtype]
        if self.is_complete or self._is_resumed():
            return
        self._check_owned()
        self._clear()
        (folder / OWN).mkdir(parents=True, exist_ok=True)
        (folder / FINISHED).mkdir()
        (folder / PROGRESS).write_text(json.dumps(asdict(metadata)))

    @property
    def is_complete(self) -> bool:
        """True if a run with the same metadata has written all files, and they still exist."""
        try:
            if svd_experts.read_metadata(self.folder / METADATA) != self.metadata:
                return False
        except CheckpointError:
            return False
        names = [
            svd_experts.expert_file(layer_idx, expert)
            for layer_idx in self._sparse_layers
            for expert in range(self.metadata.num_experts)
        ]
        return all((self.folder / name).is_file() for name in (BASES, *names))

    def has_layer(self, layer_idx: int) -> bool:
        return self._bases(layer_idx).is_file()

    def write_layer(
        self, layer_idx: int, bases: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Write U [I, L] of each kind, and V [L, O] of each kind for each expert."""
        for expert, matrices in enumerate(experts):
            stored = {expert_name(kind): self._stored(v_LO) for kind, v_LO in matrices.items()}
            save_file(stored, self.folder / svd_experts.expert_file(layer_idx, expert))
        stored = {basis_name(layer_idx, kind): self._stored(u) for kind, u in bases.items()}
        part = self._bases(layer_idx).with_suffix(".part")
        save_file(stored, part)
        part.replace(self._bases(layer_idx))

    def finish(self) -> None:
        """Write the bases of all layers to one file, and the metadata."""
        bases: dict[str, Tensor] = {}
        for path in sorted((self.folder / FINISHED).glob("*.safetensors")):
            bases |= load_file(path)
        save_file(bases, self.folder / BASES)
        self.metadata.write(self.folder)
        shutil.rmtree(self.folder / FINISHED)
        (self.folder / PROGRESS).unlink()

    def _stored(self, matrix: Tensor) -> Tensor:
        stored = matrix.to(self._dtype).cpu().contiguous()
        if not torch.isfinite(stored).all():
            raise ValueError(f"a matrix has values beyond the range of {self.metadata.dtype}")
        return stored

    def _bases(self, layer_idx: int) -> Path:
        return self.folder / FINISHED / f"layer_{layer_idx}.safetensors"

    def _is_resumed(self) -> bool:
        try:
            return bool(json.loads((self.folder / PROGRESS).read_text()) == asdict(self.metadata))
        except (OSError, ValueError):
            return False

    def _check_owned(self) -> None:
        """Raise ValueError if the folder has files of others, which `_clear` could delete."""
        ours = {METADATA, f"{METADATA}.part", PROGRESS, BASES, FINISHED, OWN}
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if others := sorted(name for name in found - ours if not name.startswith(".")):
            raise ValueError(
                f"{self.folder} has {others[0]}, which is not a file of compressed experts: name a "
                "folder for them alone with --output-dir"
            )

    def _clear(self) -> None:
        """Delete the files of an earlier run, the metadata first."""
        for name in (METADATA, PROGRESS, BASES):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / FINISHED, ignore_errors=True)
        for path in (self.folder / "V_experts").glob("layer_*_expert_*.safetensors"):
            path.unlink()
