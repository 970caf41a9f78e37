"""Loads a model's parameters from safetensors files, or draws them at random."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.reference.packed import Codes
from nanovllm.models import experts, formats, packed, svd_experts, transposed
from nanovllm.models.checkpoint import Buffer, Checkpoint, CheckpointError, Cut, plain_buffer
from nanovllm.models.config import ModelConfig
from nanovllm.models.experts.offloaded import Offloader
from nanovllm.models.formats import Weight
from nanovllm.models.formats.format import Extent, Format, mapped, quantized, tensors_of
from nanovllm.models.formats.mixed import Mixed
from nanovllm.models.formats.packed_weight import arranged
from nanovllm.models.gguf.checkpoint import opened
from nanovllm.models.lora.regions import base_of
from nanovllm.models.lora.slots import with_expert_slots, with_outer_slots, with_slots
from nanovllm.models.model import LayerKind, Model, Param, Params
from nanovllm.models.pooling import PoolWeights
from nanovllm.models.schemes import Part
from nanovllm.models.shards import ALL, Shard, taken

# Checkpoint tensors that no forward pass reads; scales of an 8-bit cache follow from the weights.
CACHE_SCALE = r"self_attn\.((q|k|v|kv)_scale|[qkv]_proj\.([qkv]_scale|output_scale))"
IGNORED = re.compile(rf".*\.(rotary_emb\.inv_freq|masked_bias|{CACHE_SCALE})$")
RANDOM_STD = 0.02
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SLACK = 1 << 20  # numbers, for padding
ROWS_AT_ONCE = 4096  # when two tables are compared

Progress = Callable[[int], object]  # called with the number of layers that were added
Place = Callable[[Tensor], Tensor]  # moves a stored weight to separate memory


def _in_place(tensor: Tensor) -> Tensor:
    return tensor


def _by_rows(codes: Codes, depth: int) -> bool:
    return False


class Target(NamedTuple):
    """Where parameters go.

    `place` takes each tensor once, in an order that depends on the model and the format alone, and
    returns the one to use. If it is an `Offloader`, experts are read to the host's memory. `buffer`
    is that of `Checkpoint`. `shard` selects the part of each parameter. `prefers_interleaved` is
    the device's (`Platform`).
    """

    device: torch.device
    place: Place = _in_place
    buffer: Buffer = plain_buffer
    shard: Shard = ALL
    prefers_interleaved: Callable[[Codes, int], bool] = _by_rows

    def placed(self, weight: Weight) -> Weight:
        """A stored weight where and as the device's products read it."""
        return mapped(self.place, arranged(weight, self.prefers_interleaved))


def load(model: Model, folder: Path, target: Target, progress: Progress) -> Any:
    """Read a checkpoint in transformers' layout, or a GGUF file, in the formats that
    `model.scheme` chooses and otherwise in the model's dtype: `Params`, or `PoolWeights` of a model
    that pools.

    Calls `progress(n)` after every n layers.

    Experts that the config calls compressed are read from their own folder, and the checkpoint's
    experts are not read.

    Raises CheckpointError naming the tensor that is missing, left over, misshapen, quantized or of
    another dtype than described, or the file that is missing or damaged.
    """
    with opened(folder, target.buffer) as checkpoint:
        reader = WeightReader(model.config, checkpoint, target)
        params = build(model, partial(_read, model, reader), progress, target)
        extra = [name for name in reader.left_over() if not name.startswith(model.read_elsewhere)]
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensor(s) that {model.config.architecture} does not have, "
            f"e.g. {extra[0]}"
        )
    return params


class WeightReader:
    """Reads the parameters of a model from a checkpoint, and records which tensors are left."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, target: Target) -> None:
        self._config, self._checkpoint, self._target = config, checkpoint, target
        self._used: set[str] = set()
        # an example of each spelling of experts: whether it is the other one, and a tensor's name
        self._spellings: dict[bool, str] = {}
        self._orientations = transposed.Orientations()

    @property
    def num_ranks(self) -> int:
        return self._target.shard.size

    def read(self, param: Param) -> Tensor:
        """A parameter in the model's dtype on the device. Raises CheckpointError: see `load`."""
        shard = self._target.shard
        if param.kind == "places":
            return shard.places(*param.shape).to(self._target.device)
        small = param.local(shard.size)
        sources = () if param.compressed else self._sources(param)
        self._check_size(param, sources)
        out = self._empty(small)
        rows = out if out.dim() < 3 else out.flatten(0, -2)
        if param.compressed:
            assert self._config.moe is not None and self._config.moe.compression is not None
            compression, parts = self._config.moe.compression, rows.split(param.parts)
            svd_experts.read(self._checkpoint.folder, compression, zip(param.sources, parts))
            self._used.update(param.replaces)
            return out
        self._used.update(sources)
        if self._is_transposed(param, sources):
            transposed.read(self._checkpoint, shard, param, out)
            return out
        if sources == param.sources:
            own = shard.sources(param)
            parts, cuts = rows.split(small.parts), [shard.cut(param, i) for i in own]
            names = [sources[i] for i in own]
        else:
            cuts = shard.cuts_other(param)
            parts = rows.split(small.parts) if len(cuts) > 1 else (out,)
            names = list(sources) * len(cuts)
        if param.is_first_only and shard.rank:
            out.zero_()
        else:
            self._checkpoint.read_parts(map(_padded, names, parts, cuts))
        if param.adapt is not None:
            param.adapt(out, small.parts)
        return out

    def read_packed(self, param: Param, stored_as: Format, extent: Extent) -> Weight:
        """A parameter in the checkpoint's own format. Raises CheckpointError: see `load`."""
        sources = self._sources(param, partial(packed.first_name, stored_as, param.shape))
        is_joined = sources != param.sources
        self._used.update(packed.names(stored_as, param, is_joined=is_joined))
        shard, device = self._target.shard, self._target.device
        return packed.read(
            self._checkpoint, shard, param, stored_as, extent, device, is_joined=is_joined
        )

    def left_over(self) -> list[str]:
        """The tensors of the checkpoint that were not read and that a forward pass would read."""
        ignored = {HEAD} if self._config.tied_embeddings else set()
        left = set(self._checkpoint) - self._used - ignored
        known = (IGNORED.fullmatch, self._adds_nothing)
        return sorted(name for name in left if not any(is_known(name) for is_known in known))

    def _adds_nothing(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros, as AutoGPTQ writes one for each packed matrix."""
        module, _, end = name.rpartition(".")
        if end != "bias" or f"{module}.qweight" not in self._used:
            return False
        shape = self._checkpoint.shape(name)
        return len(shape) == 1 and not self._checkpoint.rows(name, slice(0, shape[0])).any()

    def _check_size(self, param: Param, sources: tuple[str, ...]) -> None:
        """Refuse a config that asks for far more numbers than are stored, before there is memory
        for them. Smaller differences are found when the tensors are read."""
        wanted, shapes = math.prod(param.shape), list(map(self._checkpoint.shape, sources))
        if sources and wanted > 2 * sum(map(math.prod, shapes)) + SLACK:
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor {sources[0]} has shape {list(shapes[0])}, but "
                f"the config asks for {wanted} numbers in {len(sources)} tensor(s)"
            )

    def _empty(self, param: Param) -> Tensor:
        """Memory for a parameter."""
        place = self._target.place
        if isinstance(place, Offloader) and param.kind == "experts":
            return place.empty(param.shape, self._config.dtype)
        dtype = param.dtype or self._config.dtype
        return torch.empty(param.shape, dtype=dtype, device=self._target.device)

    def _is_transposed(self, param: Param, sources: tuple[str, ...]) -> bool:
        """Whether the one tensor of all sources is transposed. Raises CheckpointError."""
        if sources == param.sources:
            return False
        if not param.may_be_transposed:
            return param.is_interleaved
        return self._orientations.is_transposed(self._checkpoint, sources[0], param)

    def _sources(self, param: Param, tensor_of: Callable[[str], str] = str) -> tuple[str, ...]:
        """The names of the tensors of a parameter, in one of two spellings. `tensor_of` gives the
        tensor that shows that there is one with a name.

        Raises CheckpointError if a checkpoint mixes those of experts, or has neither for a layer.
        """
        checkpoint, spellings = self._checkpoint, self._spellings
        other: tuple[str, ...] = (param.other_name,) if param.other_name is not None else ()
        is_other = any(tensor_of(name) in checkpoint for name in other)
        if param.kind == "experts":
            known = [tensor_of(name) for name in (*other, *param.sources)]
            present = [name for name in known if name in checkpoint]
            if not present:
                names = " nor ".join(map(tensor_of, (param.sources[0], *other)))
                raise CheckpointError(f"{checkpoint.folder}: it has neither {names}")
            spellings[is_other] = present[0]
            both = present[1] if is_other and present[1:] else spellings.get(not is_other)
            if both is not None:
                raise CheckpointError(
                    f"{checkpoint.folder} mixes two spellings of experts: it has {present[0]} and "
                    f"{both}"
                )
        return other if is_other else param.sources


def _padded(source: str, part: Tensor, cut: Cut) -> tuple[str, Tensor, Cut]:
    """What to read; the rows of `part` for which there is nothing are zeroed."""
    num = (cut.stop - cut.start) * cut.unit * cut.num_runs
    flat = part.view(-1)
    if num < len(flat):
        flat[num:].zero_()
    return source, flat[:num], cut


def has_own_head(folder: Path, dtype: torch.dtype) -> bool:
    """True if the checkpoint has a head whose values, in `dtype`, differ from the embedding table.

    In this case transformers does not tie them, even if the config ties them. Reads only headers if
    no head is stored, and otherwise up to the first difference. False without weights.
    """
    if not any(folder.glob("*.safetensors")):
        return False
    with Checkpoint(folder) as checkpoint:
        if TABLE not in checkpoint or HEAD not in checkpoint:
            return False
        if checkpoint.shape(TABLE) != checkpoint.shape(HEAD):
            return True
        num_rows = checkpoint.shape(TABLE)[0]
        for start in range(0, num_rows, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, num_rows))
            table, head = (checkpoint.rows(name, rows).to(dtype) for name in (TABLE, HEAD))
            if not torch.equal(table, head):
                return True
    return False


def _read(model: Model, reader: WeightReader, param: Param) -> Weight:
    """A parameter as it is stored: from the checkpoint's own numbers where a format reads them, and
    else converted from the model's dtype."""

    def read(part: Part) -> Weight:
        extent = model.extent(part.param)
        if part.format.is_packed:
            return reader.read_packed(*part, extent)
        return _quantized(part, reader.read(part.param), extent)

    if param.kind == "heads":
        return _dequantized(model, reader, param)
    parts = model.scheme.parts(param)
    return _joined(model, parts, list(map(read, parts)))


def _dequantized(model: Model, reader: WeightReader, param: Param) -> Tensor:
    """A plain parameter that a checkpoint may store in the format of a linear layer."""
    (part,) = model.scheme.parts(param._replace(kind="linear", adapt=None))
    if not part.format.is_packed:
        return reader.read(param)
    stored = reader.read_packed(*part, model.extent(part.param))
    weight = formats.rows(stored, 0).to(param.dtype or model.config.dtype)
    if param.adapt is not None:
        param.adapt(weight, param.local(reader.num_ranks).parts)
    return weight


def _quantized(part: Part, weight: Tensor, extent: Extent) -> Weight:
    return quantized(part.format, ", ".join(part.param.sources), weight, extent)


def _joined(model: Model, parts: Sequence[Part], weights: Sequence[Weight]) -> Weight:
    """The weight whose rows are those of all parts of a parameter."""
    if len(weights) == 1:
        return weights[0]
    plain = [one for one in weights if isinstance(one, Tensor)]
    if len(plain) == len(weights):
        return torch.cat(plain, dim=-2)
    return Mixed(tuple(weights), tuple(model.extent(part.param).shape[-2] for part in parts))


def random(model: Model, target: Target, seed: int, progress: Progress) -> Any:
    """Seeded weights: normal with standard deviation 0.02, norms at one, biases at zero.

    Routers of such weights route tokens as if at random. The parts of all ranks are those of one
    model.
    """
    device, place, shard = target.device, target.place, target.shard
    generator = torch.Generator(device).manual_seed(seed)

    def draw(param: Param) -> Weight:
        if param.kind == "places":
            return shard.places(*param.shape).to(device)
        dtype = param.dtype or model.config.dtype
        weight = torch.empty(param.shape, dtype=dtype, device=device)
        if param.kind in ("norm", "bias"):
            return taken(shard, param, weight.fill_(float(param.kind == "norm")))
        weight.normal_(0.0, RANDOM_STD, generator=generator)
        weight = taken(shard, param, weight)
        if isinstance(place, Offloader) and param.kind == "experts":
            return place.empty(weight.shape, weight.dtype).copy_(weight)
        return converted(model, param, weight)

    return build(model, draw, progress, target)


def undefined(model: Model, target: Target) -> Any:
    """Weights whose numbers are not defined, and are not read: for fake tensors."""
    device, place, shard = target.device, target.place, target.shard

    def empty(model: Model, param: Param, weight: Tensor) -> Weight:
        return _converted(model, param, weight, _empty)

    def make(param: Param) -> Weight:
        if param.kind == "places":
            return shard.places(*param.shape).to(device)
        weight = torch.empty(param.shape, dtype=param.dtype or model.config.dtype, device=device)
        weight = taken(shard, param, weight)
        if isinstance(place, Offloader) and param.kind == "experts":
            return place.empty(weight.shape, weight.dtype)
        return empty(model, param, weight)

    return build(model, make, lambda _: None, target, empty)


def _empty(part: Part, weight: Tensor, extent: Extent) -> Weight:
    return weight if part.format.is_plain else part.format.empty(extent, weight.device)


Conversion = Callable[[Part, Tensor, Extent], Weight]


def converted(model: Model, param: Param, weight: Tensor) -> Weight:
    """This rank's share of a parameter, from the model's dtype to its formats."""
    return _converted(model, param, weight, _quantized)


def _converted(model: Model, param: Param, weight: Tensor, convert: Conversion) -> Weight:
    parts = model.scheme.parts(param)
    extents = [model.extent(part.param) for part in parts]
    if len(parts) == 1:
        return convert(parts[0], weight, extents[0])
    rows = weight.split([extent.shape[-2] for extent in extents], dim=-2)
    return _joined(model, parts, list(map(convert, parts, rows, extents)))


def build(
    model: Model,
    make: Callable[[Param], Weight],
    progress: Progress,
    target: Target,
    convert: Callable[[Model, Param, Tensor], Weight] = converted,
) -> Any:
    """The parameters that `make` gives as they are stored; `convert` makes a tied head."""
    place = target.place

    def made(declared: dict[str, Param]) -> dict[str, Any]:
        return {name: target.placed(make(param)) for name, param in declared.items()}

    def made_layer(declared: dict[str, Param], kind: LayerKind) -> Any:
        layer_type = model.layer_type(kind)
        values = dict.fromkeys(layer_type._fields) | made(declared)
        if kind.sparse:
            gathered = experts.gather(values)
            if isinstance(place, Offloader):
                gate_up_EGD, down_EDF = gathered
                assert isinstance(gate_up_EGD, Tensor) and isinstance(down_EDF, Tensor)
                gathered = place.stored(gate_up_EGD, down_EDF)
            values["experts"] = gathered
        if model.lora is not None:
            values |= _with_slots(model, declared, values, place)
        return layer_type(**values)

    outer_params, *layer_params = model.declared
    outer = _with_extra(model, dict.fromkeys(model.lent) | made(outer_params))
    if model.tied_head is not None:
        table = outer["embed_VD"]
        if not model.head_is_table:
            table = target.placed(convert(model, model.tied_head, table))
        outer["head_VD"] = table
    outer |= with_outer_slots(model, outer, place)
    layers = []
    for declared, kind in zip(layer_params, model.layer_kinds):
        layers.append(made_layer(declared, kind))
        progress(1)
    if model.pooler is not None:
        return PoolWeights(model.pooler.outer_type(**outer), tuple(layers))
    return Params(layers=tuple(layers), **outer)


def _with_extra(model: Model, outer: dict[str, Any]) -> dict[str, Any]:
    """Weights outside the layers, with those of `Model.extra_type` in one field."""
    if model.extra_type is None:
        return outer
    own = {name: outer.pop(name, None) for name in model.extra_type._fields}
    return {**outer, "extra": model.extra_type(**own)}


def with_second(params: Params, model: Model, second: Params) -> Params:
    """Params with those of a second `model`, which proposes tokens and may use some of them."""
    lent: dict[str, Any] = {name: base_of(getattr(params, name)) for name in model.lent}
    return params._replace(draft=second._replace(**lent))


def _with_slots(
    model: Model, declared: dict[str, Param], values: dict[str, Any], place: Place
) -> dict[str, Any]:
    """A layer's weights, of linear layers and perhaps experts with empty slots for adapters."""
    assert model.lora is not None
    found: dict[str, Any] = {}
    if model.lora.experts and values.get("experts") is not None:
        found["experts"] = with_expert_slots(model, declared, values["experts"], place)
    for name, param in declared.items():
        if name in values:  # not a part of experts
            device = tensors_of(values[name])[0].device
            facts = model.config.num_ranks, model.config.dtype, device
            found[name] = with_slots(model.lora, declared, param, values[name], facts, place)
    return found
