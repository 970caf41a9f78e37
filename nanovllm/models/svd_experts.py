"""Compressed experts beside a checkpoint: their files and metadata.

    svd_experts/U_matrices.safetensors                       the bases that a layer's experts share
    svd_experts/V_experts/layer_0_expert_0.safetensors       the matrices of each expert
    svd_experts/metadata.json                                written last; marks completeness

A matrix [O, I] of expert e, which maps x [I] to x · Wᵀ, is stored as Wᵀ ≈ U · V_e. U [I, L] is the
basis of the layer and the kind of matrix, V_e is [L, O].

O outputs | I inputs | L rank of the bases
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.config import Compression, ModelConfig
from nanovllm.models.model import Model

logger = logging.getLogger(__name__)

FOLDER = "svd_experts"
BASES, METADATA = "U_matrices.safetensors", "metadata.json"
OWN = "V_experts"
# files that an interrupted compression script may leave
PROGRESS, FINISHED = "progress.json", "U_finished"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GATE, UP, DOWN = KINDS = ("w1", "w3", "w2")  # the kinds of matrices, in Mixtral's names
READERS = 8  # threads


def basis_name(layer_idx: int, kind: str) -> str:
    """The name of a basis in the file BASES."""
    return f"layer_{layer_idx}_{kind}_U"


def expert_file(layer_idx: int, expert: int) -> str:
    """The file of one expert, relative to FOLDER."""
    return f"{OWN}/layer_{layer_idx}_expert_{expert}.safetensors"


def expert_name(kind: str) -> str:
    """The name of a matrix in the file of an expert."""
    return f"{kind}_V"


def basis_source(layer_idx: int, kind: str) -> str:
    """The name of a basis in `Param.sources`."""
    return f"{FOLDER}/{BASES}:{basis_name(layer_idx, kind)}"


def expert_source(layer_idx: int, expert: int, kind: str) -> str:
    """The name of an expert's matrix in `Param.sources`."""
    return f"{FOLDER}/{expert_file(layer_idx, expert)}:{expert_name(kind)}"


@dataclass(frozen=True)
class Metadata:
    """The content of metadata.json. `method` is "pca" or "distilled"; `made_from` is for
    readers."""

    method: str
    rank: int
    dtype: str  # a key of DTYPES
    architecture: str
    num_layers: int
    num_experts: int
    hidden_size: int
    expert_size: int
    made_from: dict[str, object]

    @classmethod
    def of(
        cls, cfg: ModelConfig, method: str, rank: int, dtype: str, made_from: dict[str, object]
    ) -> Metadata:
        """The description of compressed experts of a model."""
        assert cfg.moe is not None
        return cls(
            method, rank, dtype, cfg.architecture, cfg.num_layers, cfg.moe.num_experts,
            cfg.hidden_size, cfg.moe.expert_size, made_from,
        )  # fmt: skip

    def write(self, folder: Path) -> None:
        """Write metadata.json in `folder`, whole or not at all."""
        part = folder / f"{METADATA}.part"
        part.write_text(json.dumps(asdict(self), indent=2) + "\n")
        part.replace(folder / METADATA)


def read_metadata(path: Path) -> Metadata:
    """The content of a metadata.json. Raises CheckpointError, with its path, if it is damaged."""
    try:
        found = json.loads(path.read_text())
        metadata = Metadata(**{field.name: found[field.name] for field in fields(Metadata)})
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: the compressed experts of this folder are not complete. Run the "
            f"script that makes them again, delete {path.parent}, or set NANOVLLM_DISABLE_SVD=1"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable: {type(error).__name__} {error}") from error
    if metadata.dtype not in tuple(DTYPES):  # a tuple, since a list is not hashable
        raise CheckpointError(
            f"{path}: dtype is {metadata.dtype!r}: it must be one of {', '.join(DTYPES)}"
        )
    if not isinstance(metadata.rank, int) or isinstance(metadata.rank, bool) or metadata.rank < 1:
        raise CheckpointError(f"{path}: rank is {metadata.rank!r}: it must be a positive integer")
    return metadata


def find(folder: Path, cfg: ModelConfig) -> Compression | None:
    """How the experts beside the checkpoint in `folder` are compressed; None if there are none.

    Raises CheckpointError, with the file, if they are incomplete or of another model.
    """
    path = folder / FOLDER / METADATA
    if not path.parent.is_dir():
        return None
    if cfg.moe is None:
        raise CheckpointError(
            f"{path.parent} holds compressed experts, but {cfg.architecture} has no experts. "
            f"{_way_out(path.parent)}"
        )
    found = read_metadata(path)
    wanted = Metadata.of(cfg, found.method, found.rank, found.dtype, found.made_from)
    for name, value in asdict(wanted).items():
        if getattr(found, name) != value:
            raise CheckpointError(
                f"{path}: {name} is {getattr(found, name)!r}, but the checkpoint has {value!r}: "
                f"the compressed experts are of another model. {_way_out(path.parent)}"
            )
    largest = max_rank(cfg)
    if found.rank > largest:
        raise CheckpointError(
            f"{path}: rank is {found.rank}: it must be at most {largest}, the number of inputs of "
            f"the narrowest matrix of an expert. {_way_out(path.parent)}"
        )
    return Compression(found.rank, DTYPES[found.dtype])


def max_rank(cfg: ModelConfig) -> int:
    """The largest rank of bases: the number of inputs of the narrowest matrix."""
    assert cfg.moe is not None
    return min(cfg.hidden_size, cfg.moe.expert_size)


def _way_out(folder: Path) -> str:
    return f"Delete {folder} and make it again, or set NANOVLLM_DISABLE_SVD=1"


def applied(model: Model, folder: Path) -> Model:
    """The model with the compressed experts beside its checkpoint, if there are any: see `find`.

    Raises CheckpointError also for files that do not belong to them.
    """
    cfg = model.config
    compression = find(folder, cfg)
    if cfg.moe is None or compression is None:
        return model
    layers = [idx for idx, kind in enumerate(model.layer_kinds) if kind.sparse]
    _refuse_others(folder / FOLDER, layers, cfg.moe.num_experts)
    message = "compressed experts of rank %d are used from %s (NANOVLLM_DISABLE_SVD=1: not used)"
    logger.info(message, compression.rank, folder / FOLDER)
    return replace(model, config=replace(cfg, moe=replace(cfg.moe, compression=compression)))


def _refuse_others(folder: Path, layers: Iterable[int], num_experts: int) -> None:
    """Raise CheckpointError for a file that belongs to no expert of these layers. Files of other
    programs, whose names begin with a dot, are ignored."""
    known = {expert_file(layer_idx, e) for layer_idx in layers for e in range(num_experts)}
    known |= {BASES, METADATA, OWN, PROGRESS, FINISHED}
    found = [path.name for path in folder.iterdir()]
    if (folder / OWN).is_dir():
        found += [f"{OWN}/{path.name}" for path in (folder / OWN).iterdir()]
    others = (name for name in found if not name.rpartition("/")[2].startswith("."))
    if unknown := sorted(set(others) - known):
        raise CheckpointError(
            f"{folder / unknown[0]} is not a file of the compressed experts that the metadata "
            f"describes ({len(unknown)} such file(s)): the folder may hold those of another model. "
            f"Remove it, or: {_way_out(folder)}"
        )


def read(folder: Path, compression: Compression, wanted: Iterable[tuple[str, Tensor]]) -> None:
    """Copy the transpose of each source, "file:tensor" in the checkpoint's folder, to a tensor.

    Raises CheckpointError for a file that is missing, damaged, of another rank or dtype, or holds
    NaN or infinity.
    """
    sources, outs = zip(*wanted)
    shapes = (out_OI.shape for out_OI in outs)
    with ThreadPoolExecutor(READERS, "read-experts") as pool:
        found = pool.map(lambda *one: _transposed(folder, compression, *one), sources, shapes)
        for out_OI, matrix_OI in zip(outs, found):
            out_OI.copy_(matrix_OI)  # not in a thread, whose current device may differ


def _transposed(folder: Path, compression: Compression, source: str, shape: torch.Size) -> Tensor:
    """The transpose of a source, which must have `shape`, as a copy."""
    file_name, _, name = source.rpartition(":")
    path = folder / file_name
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the compressed experts are not complete. "
            f"{_way_out(folder / FOLDER)}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            stored_IO: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: tensor {name} cannot be read: {error}. {_way_out(folder / FOLDER)}"
        ) from error
    if stored_IO.dtype is not compression.dtype:
        raise CheckpointError(
            f"{path}: tensor {name} is {_short(stored_IO.dtype)}, but the metadata has dtype "
            f"{_short(compression.dtype)}"
        )
    if stored_IO.t().shape != shape:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(stored_IO.shape)}, but rank {compression.rank} "
            f"and the config ask for {list(shape[::-1])}"
        )
    # the sum first: it reads the matrix once, and is not finite if one of its numbers is not
    total = stored_IO.sum(dtype=torch.float32)
    if not total.isfinite() and not stored_IO.isfinite().all():
        raise CheckpointError(
            f"{path}: tensor {name} holds NaN or infinity. {_way_out(folder / FOLDER)}"
        )
    return stored_IO.t().clone(memory_format=torch.contiguous_format)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
