"""Reads an adapter that PEFT has saved into the layout of a model's slots.

O outputs | D depth | P parts of the outputs | X rank of the slots | L = P · X
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.models.checkpoint import DTYPES, PART_PREFIX, TEXT_PREFIXES, CheckpointError, File
from nanovllm.models.lora import embeddings, expert_file
from nanovllm.models.lora.biases import BIAS, TrainedBiases, added
from nanovllm.models.lora.host_adapter import HostAdapter, layout
from nanovllm.models.lora.peft_config import CONFIG, WEIGHTS, AdapterError, PeftConfig
from nanovllm.models.lora.slots import Target, targets
from nanovllm.models.model import Model
from nanovllm.models.param import Param
from nanovllm.models.shards import Shard, taken

PREFIX = "base_model.model."
MATRICES = re.compile(
    r"(?P<module>.+)\.lora_((?P<which>[AB])\.weight|embedding_(?P<of_table>[AB]))"
)
# Other tensors of PEFT's, by what their names contain.
OTHERS = {"lora_magnitude_vector": "DoRA", "modules_to_save": "whole copies of modules"}
ALL_SOURCES = -1  # in place of a source's number
Buffer = Callable[[int], Tensor]


class _Pair(NamedTuple):
    """The matrices of a module in a file, and their rank."""

    module: str
    rank: int
    prefix: str
    parameter: str | None = None  # whose matrices of all experts they change
    is_of_table: bool = False

    @property
    def name(self) -> str:
        """What the config names."""
        return self.parameter or self.module

    def key(self, which: str) -> str:
        end = f"embedding_{which}" if self.is_of_table else f"{which}.weight"
        return f"{self.prefix}{self.module}.lora_{end}"


class AdapterFile:
    """An adapter's folder, checked against a model: a config, and tensors for its linear layers,
    perhaps with head and table.

    `digest` changes with the files. Raises AdapterError, without reading tensors.
    """

    def __init__(
        self,
        model: Model,
        folder: Path,
        known: Sequence[Target] | None = None,
        biases: Mapping[int, Tensor] | None = None,
    ) -> None:
        """known: the `targets` of the model, if they have been found before. biases: those of the
        model on this rank, in fp32, by the numbers of targets whose biases adapters change."""
        assert model.lora is not None
        self._model, self._folder, self._slots = model, folder, model.lora
        self.config = PeftConfig.checked(folder, self._slots.max_rank)
        self.digest = _digest(folder)
        self._targets = list(targets(model)) if known is None else known
        self._base_biases = {} if biases is None else biases
        with self._opened() as file:
            self._pairs = self._checked(file)

    def read(self, shard: Shard, buffer: Buffer) -> HostAdapter:
        """The matrices of a rank. `buffer` makes host memory of so many bytes. Raises
        AdapterError for numbers that are not finite, and for a file that has changed."""
        places, sizes = layout(self._model, self._targets, shard.size)
        blocks = [buffer(size).view(self._model.config.dtype) for size in sizes]
        found = HostAdapter(blocks, places)
        matrices = iter(found.matrices(blocks))
        with self._opened() as file:
            if file.tensors != self._tensors:
                raise AdapterError(f"{self._folder / WEIGHTS} has changed since it was checked")
            for i, target in enumerate(self._targets):
                self._fill(file, target, shard, (next(matrices), next(matrices)))
                if target.bias is not None:
                    next(matrices).copy_(self._added_bias(file, i, shard))
        return found

    @contextmanager
    def _opened(self) -> Iterator[File]:
        try:
            with closing(File(self._folder / WEIGHTS)) as file:
                yield file
        except CheckpointError as error:
            raise AdapterError(str(error)) from error

    def _checked(self, file: File) -> dict[str, _Pair]:
        """The pairs in a file, by the names of modules as the model has them."""
        biases = self._biases = TrainedBiases(self._targets, self.config.bias, _own_name)
        found_shapes: dict[tuple[str, bool], dict[str, tuple[int, ...]]] = {}
        self._tensors = file.tensors
        self._prefix = PREFIX if all(key.startswith(PREFIX) for key in file.tensors) else ""
        for key, found in file.tensors.items():
            name = key.removeprefix(self._prefix)
            match = MATRICES.fullmatch(name)
            if name.endswith(BIAS):
                biases.note(name, key, found.shape)
                continue
            if name.endswith(embeddings.COPY):
                self._check_copy(name, found.shape)
                continue
            if match is None:
                raise AdapterError(f"{self._folder / WEIGHTS}: {_why_not(name)}")
            if found.dtype not in DTYPES or len(found.shape) != 2:
                raise AdapterError(
                    f"{self._folder / WEIGHTS}: {key} is {found.dtype} {list(found.shape)}: "
                    "it must be a matrix of floating point numbers"
                )
            of_module = found_shapes.setdefault((match["module"], match["which"] is None), {})
            of_module[match["which"] or match["of_table"]] = found.shape
        if not found_shapes and not biases.keys:
            raise AdapterError(f"{self._folder / WEIGHTS} has no tensors")
        known, pairs = self._modules(), {}
        parameters = expert_file.parameters(self._targets)
        for (module, of_table), pair in found_shapes.items():
            own = _own_name(module)
            name = expert_file.parameter_of(own, pair, parameters)
            if (own, of_table) in known:
                num_outputs, depth = known[own, of_table]
                rank = self.config.rank_of(module)
                self._check_shapes(module, pair, {"A": (rank, depth), "B": (num_outputs, rank)})
                pairs[own] = _Pair(module, rank, self._prefix, is_of_table=of_table)
            elif name is not None:
                rank = self.config.rank_of(name)
                self._check_shapes(module, pair, expert_file.sizes(parameters[name], rank))
                pairs[name] = _Pair(module, rank, self._prefix, name)
            else:
                raise AdapterError(
                    f"{self._folder}: {module} is not a linear layer of "
                    f"{self._model.config.architecture} that adapters can change{self._hint(own)}"
                )
            self._check_is_named(pairs[own if name is None else name])
        return pairs

    def _added_bias(self, file: File, target_idx: int, shard: Shard) -> Tensor:
        """What an adapter adds to a rank's part of a bias."""
        param = self._targets[target_idx].bias
        assert param is not None
        given = {
            source: self._finite(file, self._biases.keys[source])
            for source in param.sources
            if source in self._biases.keys
        }
        return added(param, shard, given, self._base_biases[target_idx])

    def _hint(self, module: str) -> str:
        if ".experts" in module and not self._slots.experts:
            return ": those of experts need the option lora_experts=True"
        return embeddings.hint(module, has_slots=self._slots.embeddings)

    def _modules(self) -> dict[tuple[str, bool], tuple[int, int]]:
        """The outputs and the depth of each linear layer, by its name, and of tables, which are
        marked."""
        found = {}
        for target in self._targets:
            param = target.param
            if param.kind == "table":
                found[_module(param.sources[0]), True] = param.shape[1], param.shape[0]
                continue
            for source, rows in zip(param.sources, param.parts):
                found[_module(source), False] = rows, param.shape[-1]
            if param.other_name is not None and param.kind != "experts":
                found[_module(param.other_name), False] = param.shape[0], param.shape[1]
        return found

    def _check_copy(self, name: str, shape: Sequence[int]) -> None:
        """Raises AdapterError for a copy of a weight that the model does not have so."""
        own = _own_name(name.removesuffix(embeddings.COPY))
        known = embeddings.shapes_of_copies(self._targets)
        if known.get(own) != tuple(shape):
            raise AdapterError(
                f"{self._folder / WEIGHTS}: {name} {list(shape)} is not a copy of the model's "
                f"table or head{self._hint(own)}"
            )

    def _check_shapes(
        self, module: str, given: expert_file.Shapes, wanted: expert_file.Shapes
    ) -> None:
        """Raises AdapterError unless a module has both matrices, of the right shapes."""
        if given != wanted:
            shown = ", ".join(f"lora_{one} {list(shape)}" for one, shape in sorted(given.items()))
            needed = ", ".join(f"lora_{one} {list(shape)}" for one, shape in wanted.items())
            base = f" (it was trained for {self.config.base!r})" if self.config.base else ""
            raise AdapterError(f"{self._folder}: {module} has {shown}: it must have {needed}{base}")

    def _check_is_named(self, pair: _Pair) -> None:
        """Raises AdapterError unless the config names what a pair changes."""
        config, name = self.config, pair.parameter
        if not (config.targets(pair.module) if name is None else config.targets_parameter(name)):
            named = (
                f"target_modules {config.target_modules!r}"
                if name is None
                else f"target_parameters {list(config.target_parameters)}"
            )
            raise AdapterError(
                f"{self._folder}: {WEIGHTS} has {name or pair.module}, which {named} and the other "
                f"fields of {CONFIG} leave out"
            )

    def _fill(self, file: File, target: Target, shard: Shard, into: tuple[Tensor, Tensor]) -> None:
        """Read the matrices of one linear layer, or of experts: this rank's columns of A, or its
        rows of B; zeros for what the file does not have."""
        (a_LD, b_OX), param, slot_rank = into, target.param, self._slots.max_rank
        found = self._sources(param)
        has_all = ALL_SOURCES in found or len(found) == len(param.sources)
        if not has_all or any(pair.rank < slot_rank for pair in found.values()):
            a_LD.zero_()
            b_OX.zero_()
        if not found:
            return
        if param.kind == "experts":
            both = {
                i: (self._finite(file, one.key("A")), self._b(file, one))
                for i, one in found.items()
            }
            stacked = both.pop(ALL_SOURCES, None)
            expert_file.fill(target, slot_rank, shard, into, stacked, both)
            return
        if param.kind == "table":
            (pair,) = found.values()
            given = self._finite(file, pair.key("A")), self._b(file, pair)
            embeddings.fill(target, shard, into, given)
            return
        self._fill_b(file, param, shard, b_OX, found)
        self._fill_a(file, target, shard, a_LD, found)

    def _fill_b(
        self, file: File, param: Param, shard: Shard, b_OX: Tensor, found: Mapping[int, _Pair]
    ) -> None:
        # rows are read to their place, unless they are shared or change it
        is_plain = shard.size == 1 and param.adapt is None
        whole_OX = b_OX if is_plain else b_OX.new_zeros(param.shape[0], b_OX.shape[1])
        if not is_plain and whole_OX.dtype is not torch.float32:
            whole_OX = whole_OX.float()  # what is folded into a weight is rounded once
        parts = whole_OX.split(param.parts)
        for source_idx, pair in found.items():
            rows_OX = whole_OX if source_idx == ALL_SOURCES else parts[source_idx]
            place_OX = rows_OX[:, : pair.rank]
            own_OX = self._b(file, pair, place_OX)
            if own_OX is not place_OX:
                place_OX.copy_(own_OX)
        if not is_plain:
            taken_OX = taken(shard, _rows(param, b_OX.shape[1]), whole_OX)
            if param.adapt is not None:
                param.adapt(taken_OX, param.local(shard.size).parts)
            b_OX.copy_(taken_OX)

    def _fill_a(
        self, file: File, target: Target, shard: Shard, a_LD: Tensor, found: Mapping[int, _Pair]
    ) -> None:
        param, of_source = target.param, dict[int, Tensor]()
        for a_XD, part in zip(a_LD.split(self._slots.max_rank), target.parts):
            source_idx = ALL_SOURCES if ALL_SOURCES in found else part.source_idx
            if (pair := found.get(source_idx)) is None:
                continue
            place_XD = a_XD[: pair.rank]
            if source_idx not in of_source:
                into = place_XD if shard.size == 1 else None
                of_source[source_idx] = self._finite(file, pair.key("A"), into=into)
            own_XD = of_source[source_idx]
            if own_XD is not place_XD:
                place_XD.copy_(taken(shard, _columns(param, own_XD), own_XD))

    def _sources(self, param: Param) -> dict[int, _Pair]:
        """The pairs for a parameter, by the numbers of its sources; ALL_SOURCES if they are one
        module."""
        joined = None if param.other_name is None else self._pairs.get(_module(param.other_name))
        pairs = ((i, self._pairs.get(_module(one))) for i, one in enumerate(param.sources))
        found = {i: pair for i, pair in pairs if pair is not None}
        if joined is None:
            return found
        if found:
            (first, *_) = found.values()
            raise AdapterError(f"{self._folder} has both {joined.module} and {first.module}")
        return {ALL_SOURCES: joined}

    def _b(self, file: File, pair: _Pair, into: Tensor | None = None) -> Tensor:
        """B times its factor, which is rounded once."""
        scale = self.config.scale_of(pair.name)
        b_OX = self._finite(file, pair.key("B"), scale, into)
        b_OX = b_OX.to(torch.promote_types(b_OX.dtype, self._model.config.dtype))
        return b_OX if scale == 1.0 else b_OX.mul_(scale)

    def _finite(
        self, file: File, key: str, scale: float = 1.0, into: Tensor | None = None
    ) -> Tensor:
        """A tensor whose numbers, times a factor, are finite in the model's dtype. It is `into`, if
        that has the file's dtype and its numbers are beside each other.

        All ranks look at the whole tensor, so all refuse it.
        """
        stored = file.tensors[key]
        dtype = DTYPES[stored.dtype]
        if into is None or into.dtype != dtype or not into.is_contiguous():
            into = torch.empty(stored.shape, dtype=dtype)
        file.fill(into, stored.begin)
        largest = max(abs(one.item() * scale) for one in into.aminmax())
        if not largest <= torch.finfo(self._model.config.dtype).max:
            raise AdapterError(
                f"{self._folder / WEIGHTS}: {key} has numbers that are not finite in "
                f"{str(self._model.config.dtype).removeprefix('torch.')}"
            )
        return into


def _rows(param: Param, rank: int) -> Param:
    """A parameter whose rows are those of a linear layer: its B."""
    axis = 0 if param.shard_axis == 0 else None
    return param._replace(shape=(param.shape[0], rank), shard_axis=axis)


def _columns(param: Param, a_XD: Tensor) -> Param:
    """A parameter whose columns are those of a linear layer: its A."""
    axis = 1 if param.shard_axis == 1 else None
    whole = Param.one("linear", param.sources[0], *a_XD.shape, shard_axis=axis)
    return whole._replace(units=param.units if axis else ())


def _module(source: str) -> str:
    return source.removesuffix(".weight")


def _own_name(module: str) -> str:
    """A module's name in transformers as the model's parameters have it."""
    name = module.removeprefix(PART_PREFIX)
    for prefix in (*TEXT_PREFIXES, "model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return f"model.{name}" if name.startswith("layers.") else name


def _why_not(name: str) -> str:
    for part, what in OTHERS.items():
        if part in name:
            return f"{name} is {what}, which is not supported"
    if name.endswith(".weight") and ".lora_" not in name:
        return (
            f"{name} is the whole weight of a module, as PEFT's modules_to_save and "
            "save_embedding_layers write it, which is not supported"
        )
    return (
        f"{name} is not a matrix of LoRA: its name must end with .lora_A.weight or .lora_B.weight"
    )


def _digest(folder: Path) -> bytes:
    """A digest that changes when the files do."""
    total = sha256(str(folder.resolve()).encode())
    for name in (CONFIG, WEIGHTS):
        path = folder / name
        try:
            stat = path.stat()
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error}") from error
        total.update(f"\0{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}".encode())
    return total.digest()
