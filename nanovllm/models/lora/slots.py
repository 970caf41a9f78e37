"""The slots of a model's linear layers for the matrices of adapters.

O outputs | D depth | N slots | P parts of the outputs | X rank | L = P · X
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from nanovllm.models.formats import Weight
from nanovllm.models.lora.regions import Adapted
from nanovllm.models.model import LoraSlots, Model
from nanovllm.models.param import Param, RowOrder

# A reordered matrix, such as that of heads with gates, has a part for each run of rows of a source.
MAX_PARTS = 8


class Part(NamedTuple):
    """Neighbouring outputs of a linear layer that are rows of one source of its parameter."""

    source_idx: int
    num_rows: int


class Target(NamedTuple):
    """A linear layer that adapters can change: its layer, its field, its parameter, and the parts
    of its outputs on one rank."""

    layer_idx: int
    field: str
    param: Param
    parts: tuple[Part, ...]


def parts_of(param: Param, num_ranks: int) -> tuple[Part, ...]:
    """The parts of a linear layer's outputs on each rank; none if its rows are too mixed."""
    small = param.local(num_ranks)
    if not isinstance(param.adapt, RowOrder):
        return tuple(Part(*part) for part in enumerate(small.parts))
    with unset_fake_temporarily():  # a dry run makes weights without numbers
        source_O1 = torch.cat([torch.full((num, 1), idx) for idx, num in enumerate(small.parts)])
        param.adapt(source_O1, small.parts)
        sources = source_O1.flatten().tolist()
    runs = [Part(source, len(list(rows))) for source, rows in groupby(sources)]
    return tuple(runs) if len(runs) <= MAX_PARTS else ()


def targets(model: Model) -> Iterator[Target]:
    """The linear layers of a model's layers that have slots, in the order of computation."""
    num_ranks, (_, *layers) = model.config.num_ranks, model.declared
    for layer_idx, declared in enumerate(layers):
        for field, param in declared.items():
            if param.kind == "linear" and (parts := parts_of(param, num_ranks)):
                yield Target(layer_idx, field, param, parts)


def slots_bytes(model: Model) -> int:
    """Bytes of all slots on one rank."""
    if model.lora is None:
        return 0
    num, rank = model.lora
    numbers = 0
    for target in targets(model):
        num_outputs, depth = target.param.local(model.config.num_ranks).shape
        numbers += (len(target.parts) * depth + num_outputs) * rank
    return num * numbers * model.config.dtype.itemsize


def with_slots(
    slots: LoraSlots,
    param: Param,
    weight: Weight,
    extent: tuple[int, torch.dtype, torch.device],
    place: Callable[[Tensor], Tensor],
) -> Weight:
    """A parameter's weight on one rank with empty slots, if it is a linear layer's. `extent` is the
    number of ranks, the dtype and the device."""
    num_ranks, dtype, device = extent
    parts = parts_of(param, num_ranks) if param.kind == "linear" else ()
    if not parts:
        return weight
    num_outputs, depth = param.local(num_ranks).shape
    inner = len(parts) * slots.max_rank

    def zeros(*shape: int) -> Tensor:
        return place(torch.zeros(slots.num, *shape, dtype=dtype, device=device))

    rows = tuple(part.num_rows for part in parts)
    return Adapted(weight, zeros(inner, depth), zeros(num_outputs, slots.max_rank), rows)
