"""The slots of a model's linear layers, and of its table, for the matrices of adapters.

O outputs | D depth | N slots | P parts of the outputs | X rank | L = P · X | V rows of a table
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from nanovllm.models.experts import adapted
from nanovllm.models.formats import Weight
from nanovllm.models.formats.format import tensors_of
from nanovllm.models.lora.regions import Adapted, AdaptedTable
from nanovllm.models.model import LoraSlots, Model, Params
from nanovllm.models.param import Param, RowOrder

# A reordered matrix, such as that of heads with gates, has a part for each run of rows of a source.
MAX_PARTS = 8
OUTSIDE = -1  # in place of a layer's number
HEAD = "lm_head.weight"


class Part(NamedTuple):
    """Neighbouring outputs of a linear layer that are rows of one source of its parameter."""

    source_idx: int
    num_rows: int


class Target(NamedTuple):
    """A linear layer that adapters can change: its layer, its field, its parameter, and the parts
    of its outputs on one rank; the field and the parameter of its bias, if they can change that.
    The table of tokens is one, too, without parts. It and the head are OUTSIDE layers."""

    layer_idx: int
    field: str
    param: Param
    parts: tuple[Part, ...]
    bias_field: str = ""
    bias: Param | None = None


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


def expert_parts(param: Param, num_ranks: int) -> tuple[Part, ...]:
    """The parts of the outputs of one expert."""
    return tuple(Part(*part) for part in enumerate(param.local(num_ranks).expert_rows))


def targets(model: Model) -> Iterator[Target]:
    """What has slots, in the order of computation: the linear layers of a model's layers, and
    perhaps the table before and the head after them."""
    num_ranks, (outer, *layers) = model.config.num_ranks, model.declared
    assert model.lora is not None
    if model.lora.embeddings:
        yield Target(OUTSIDE, "embed_VD", outer["embed_VD"], ())
    for layer_idx, declared in enumerate(layers):
        for field, param in declared.items():
            if param.kind == "linear" and (parts := parts_of(param, num_ranks)):
                yield Target(layer_idx, field, param, parts, *_bias(model.lora, declared, param))
            elif param.kind == "experts" and model.lora.experts:
                yield Target(layer_idx, field, param, expert_parts(param, num_ranks))
    if model.lora.embeddings:
        tied = model.tied_head
        param = outer["head_VD"] if tied is None else tied._replace(sources=(HEAD,))
        yield Target(OUTSIDE, "head_VD", param, parts_of(param, num_ranks))


def _bias(
    slots: LoraSlots, declared: dict[str, Param], param: Param
) -> tuple[str, Param] | tuple[()]:
    """The field and the parameter of a linear layer's bias, if adapters change one."""
    sources = tuple(bias_of(source) for source in param.sources)
    found = (item for item in declared.items() if item[1].sources == sources)
    return next(found, ()) if slots.biases else ()


def bias_of(source: str) -> str:
    """The name of the bias beside a weight."""
    return source.removesuffix("weight") + "bias"


def refusal_of_experts(model: Model) -> str | None:
    """Why the experts of a model cannot have adapters; None if they can."""
    moe = model.config.moe
    if moe is None:
        return "it has no experts"
    if moe.compression is not None:
        return "its experts are compressed"
    of_experts = [one for layer in model.declared for one in layer.values() if one.is_of_experts]
    if moe.activation != "silu" or any(one.kind == "bias" for one in of_experts):
        return "its experts have biases, or an activation that is not SiLU"
    return None


def matrices(params: Params, target: Target) -> tuple[Tensor, ...]:
    """The slots of a target: A and B of all slots, and what they add to the bias, if anything."""
    layer: Any = params if target.layer_idx == OUTSIDE else params.layers[target.layer_idx]
    if target.param.kind == "experts":
        is_first = target.field.startswith("gate_up")
        of_experts = layer.experts.gate_up if is_first else layer.experts.down
        return of_experts.a_NELD, of_experts.b_NEOX
    weight = getattr(layer, target.field)
    if isinstance(weight, AdaptedTable):
        return weight.a_NVX, weight.b_NDX
    added = () if weight.c_MO is None else (weight.c_MO[1:],)
    return weight.a_NLD, weight.b_NOX, *added


def shapes(target: Target, rank: int, num_ranks: int) -> list[tuple[int, ...]]:
    """The shapes of A and B of one adapter on a rank, of experts with a dimension for these, of a
    table with A transposed; then that of the bias, if adapters change it."""
    *experts, num_outputs, depth = target.param.local(num_ranks).shape
    if target.param.kind == "table":
        return [(num_outputs, rank), (depth, rank)]
    both = [(*experts, len(target.parts) * rank, depth), (*experts, num_outputs, rank)]
    return both if target.bias is None else [*both, (num_outputs,)]


def slots_bytes(model: Model) -> int:
    """Bytes of all slots on one rank."""
    if model.lora is None:
        return 0
    rank, num_ranks = model.lora.max_rank, model.config.num_ranks
    both = (shape for one in targets(model) for shape in shapes(one, rank, num_ranks))
    numbers = model.lora.num * sum(map(math.prod, both))
    biases = (one for one in targets(model) if one.bias is not None)
    numbers += sum(one.param.local(num_ranks).shape[0] for one in biases)  # those of no adapter
    numbers += model.lora.num * rank**2 * model.lora.embeddings  # identities
    return numbers * model.config.dtype.itemsize


def with_expert_slots(
    model: Model, declared: dict[str, Param], stored: Any, place: Callable[[Tensor], Tensor]
) -> adapted.Adapted:
    """A layer's experts on one rank with empty slots."""
    assert model.lora is not None
    slots, num_ranks = model.lora, model.config.num_ranks
    device = stored[-1].device if isinstance(stored[-1], Tensor) else stored[-1][0].device

    def made(field: str) -> adapted.Matrices:
        target = Target(0, field, declared[field], expert_parts(declared[field], num_ranks))
        a_NELD, b_NEOX = (
            place(torch.zeros(slots.num, *shape, dtype=model.config.dtype, device=device))
            for shape in shapes(target, slots.max_rank, num_ranks)
        )
        return adapted.Matrices(a_NELD, b_NEOX, tuple(one.num_rows for one in target.parts))

    return adapted.Adapted(stored, made("gate_up_EGD"), made("down_EDF"))


def with_slots(
    slots: LoraSlots,
    declared: dict[str, Param],
    param: Param,
    weight: Weight,
    extent: tuple[int, torch.dtype, torch.device],
    place: Callable[[Tensor], Tensor],
) -> Weight:
    """A parameter's weight on one rank with empty slots, if it is a linear layer's. `declared` are
    the parameters of its layer, `extent` the number of ranks, the dtype and the device."""
    num_ranks, dtype, device = extent
    parts = parts_of(param, num_ranks) if param.kind == "linear" else ()
    if not parts:
        return weight
    num_outputs, depth = param.local(num_ranks).shape
    inner = len(parts) * slots.max_rank

    def zeros(num: int, *shape: int) -> Tensor:
        return place(torch.zeros(num, *shape, dtype=dtype, device=device))

    rows, num = tuple(part.num_rows for part in parts), slots.num
    c_MO = zeros(num + 1, num_outputs) if _bias(slots, declared, param) else None
    both = zeros(num, inner, depth), zeros(num, num_outputs, slots.max_rank)
    return Adapted(weight, *both, rows, c_MO)


def with_outer_slots(
    model: Model, outer: dict[str, Any], place: Callable[[Tensor], Tensor]
) -> dict[str, Weight]:
    """The table and the head on one rank with empty slots, if adapters can change them."""
    slots = model.lora
    if slots is None or not slots.embeddings:
        return {}
    dtype, device = model.config.dtype, tensors_of(outer["embed_VD"])[0].device
    table, *_, head = targets(model)
    a_NVX, b_NDX = (
        place(torch.zeros(slots.num, *shape, dtype=dtype, device=device))
        for shape in shapes(table, slots.max_rank, model.config.num_ranks)
    )
    one_XX = torch.eye(slots.max_rank, dtype=dtype, device=device)
    one_NXX = place(one_XX.expand(slots.num, -1, -1).contiguous())
    extent = model.config.num_ranks, dtype, device
    return {
        "embed_VD": AdaptedTable(outer["embed_VD"], a_NVX, b_NDX, one_NXX),
        "head_VD": with_slots(slots, {}, head.param, outer["head_VD"], extent, place),
    }
