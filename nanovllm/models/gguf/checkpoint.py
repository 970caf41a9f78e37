"""The tensors of a GGUF file as those of a checkpoint in transformers' layout.

Types with codes have rows of bytes: formats (`formats.gguf`) make weights of them. Tensors with the
matrices of all experts are one tensor for each expert. What llama.cpp has changed is undone as
tensors are read: the order of rows of q and k, the 1 in some families' norms, and what `restored`
has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.models.checkpoint import (
    DTYPES,
    Buffer,
    Checkpoint,
    CheckpointError,
    Cut,
    File,
    Stored,
    plain_buffer,
)
from nanovllm.models.formats.gguf import real_values
from nanovllm.models.gguf import header as headers
from nanovllm.models.gguf.header import GgufTensor
from nanovllm.models.gguf.names import (
    ARCHITECTURES,
    PLAIN_NORM,
    ROPE_TENSORS,
    heads_key,
    of_experts,
)
from nanovllm.models.gguf.restored import Restored, changes


class GgufCheckpoint(Checkpoint):
    """The checkpoint of a GGUF file, or of several that it is split into. Raises GgufError."""

    def __init__(self, path: Path, buffer: Buffer = plain_buffer) -> None:
        self._header = headers.read(path)
        self._layout = ARCHITECTURES[self._header.architecture]
        self._restored, self._unread = changes(self._header)
        super().__init__(path, buffer)

    def read_parts(self, wanted: Iterable[tuple[str, Tensor, Cut]]) -> None:
        all_wanted = []
        for name, out, cut in wanted:
            if name in self._restored:
                self._fill_restored(name, out, cut)
            else:
                all_wanted.append((name, out, cut))
        plus_one = [one for one in all_wanted if self._is_plus_one(one[0])]
        if plus_one:
            self._read_norms(plus_one)
            all_wanted = [one for one in all_wanted if not self._is_plus_one(one[0])]
        super().read_parts(all_wanted)
        if self._layout.permutes:
            for name, out, cut in all_wanted:
                self._reorder(name, out, cut)

    def _is_plus_one(self, name: str) -> bool:
        is_norm = name.endswith("norm.weight") and not name.endswith(PLAIN_NORM)
        return self._layout.norms_plus_one and is_norm

    def _fill_restored(self, name: str, out: Tensor, cut: Cut) -> None:
        """`read_parts` for one part of a tensor that is made of others, all of which are read."""
        made = self._restored[name]
        self._dtype(name, out.dtype)
        if made.shape != cut.shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has shape {list(made.shape)}, but the config asks "
                f"for {list(cut.shape)}"
            )
        tensor = made.make(*(self._whole(source, made) for source in made.sources))
        out.view(-1).copy_(cut.of(tensor.contiguous()).flatten())

    def _whole(self, source: str, made: Restored) -> Tensor:
        """A stored tensor, in the form in which another one is made of it."""
        tensor = self._header.tensors[source]
        raw = torch.empty(tensor.num_bytes, dtype=torch.uint8)
        self._file(tensor.path).fill(raw, tensor.begin)
        if tensor.type.dtype is not None:
            stored = raw.view(DTYPES[tensor.type.dtype]).view(tensor.shape)
            return stored if made.dtype == tensor.type.dtype else stored.float()
        rows = raw.view(math.prod(tensor.shape[:-1]), -1)
        if made.type_name is not None:
            return rows
        return real_values(rows, tensor.type.name).view(tensor.shape)

    def _read_norms(self, wanted: list[tuple[str, Tensor, Cut]]) -> None:
        """Norms without the 1, which is taken off in fp32."""
        own = [(name, torch.empty(out.shape), cut) for name, out, cut in wanted]
        super().read_parts(own)
        for (_, out, _), (_, found, _) in zip(wanted, own):
            out.copy_(found - 1.0)

    def _reorder(self, name: str, out: Tensor, cut: Cut) -> None:
        """Put the rows of q and k in transformers' order: each head's, of which `out` has all."""
        key = heads_key(name)
        if key is None:
            return
        header = self._header
        num = header.get(f"{header.architecture}.{key}", int)
        num = num or header.get(f"{header.architecture}.attention.head_count", int, 1)
        whole = self.shape(name)
        head, row_len = whole[0] // num, math.prod(whole[1:])
        start, stop = cut.start * cut.unit, cut.stop * cut.unit
        if cut.num_runs != 1 or head % 2 or start % (head * row_len) or stop % (head * row_len):
            raise CheckpointError(f"{self.folder}: tensor {name} has other rows than {num} heads")
        heads = out.view(-1, head // 2, 2, row_len)
        out.copy_(heads.transpose(1, 2).flatten())

    def _locate(self) -> dict[str, Path]:
        located: dict[str, Path] = {}
        files = {path: _GgufFile(path) for path in self._header.paths}
        self._files.update(files)
        for stored, tensor in self._header.tensors.items():
            if stored not in ROPE_TENSORS and stored not in self._unread:
                for name, one in self._matrices(stored, tensor):
                    files[tensor.path].tensors[name] = one
                    located[name] = tensor.path
        for name, made in self._restored.items():
            path = self._header.tensors[made.sources[0]].path
            files[path].tensors[name] = Stored(made.dtype, made.shape, 0)
            located[name] = path
        return located

    def _matrices(self, stored: str, tensor: GgufTensor) -> Iterable[tuple[str, Stored]]:
        """The tensors in transformers' layout, by their names."""
        name = self._layout.name_of(stored)
        one, shape = tensor.type, tensor.shape
        if one.dtype is None:
            shape = (*shape[:-1], shape[-1] // one.columns * one.num_bytes)
        dtype = one.dtype or "U8"
        if "{expert}" in name:
            step = tensor.num_bytes // shape[0]
            for i, each in enumerate(of_experts(name, shape[0])):
                yield each, Stored(dtype, shape[1:], tensor.begin + i * step)
            return
        if name.endswith(".shared_expert_gate.weight") and len(shape) == 1:
            shape = (1, *shape)
        yield name, Stored(dtype, shape, tensor.begin)

    def _dtype_error(self, name: str, asked: str) -> CheckpointError:
        file, stored = self._find(name)
        found = "codes" if stored.dtype == "U8" else stored.dtype
        return CheckpointError(
            f"{file.path}: tensor {name} is stored as {found}, but {asked} is needed"
        )


class _GgufFile(File):
    """An open file whose header was read already."""

    def __init__(self, path: Path) -> None:
        self._open(path)
        self.tensors = {}


def opened(path: Path, buffer: Buffer = plain_buffer) -> Checkpoint:
    """The checkpoint of a folder, or of a GGUF file."""
    return GgufCheckpoint(path, buffer) if headers.is_gguf(path) else Checkpoint(path, buffer)


def small_tensor(header: headers.Header, name: str, largest: int) -> list[float]:
    """The numbers of an F32 tensor that has at most `largest`. Raises GgufError."""
    tensor = header.tensors[name]
    if tensor.type.dtype != "F32" or math.prod(tensor.shape) > largest:
        raise headers.GgufError(
            f"{tensor.path}: tensor {name} is {tensor.type.name} of shape {list(tensor.shape)}: it "
            f"must be F32, of at most {largest} numbers"
        )
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin)
        raw = file.read(tensor.num_bytes)
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist()
