"""The matrices of experts in an adapter's file: one pair for each linear layer of an expert, or one
for a parameter that has the matrices of all experts (PEFT's `target_parameters`).

E experts | D depth | O outputs of an expert | P parts of them | X rank of the slots | L = P · X
R rank in the file
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from nanovllm.models.lora.slots import Target
from nanovllm.models.param import Param
from nanovllm.models.shards import Shard, taken

NESTED = ".base_layer"  # PEFT's name of a module whose other parameter has an adapter, too
Shapes = Mapping[str, tuple[int, ...]]


def parameters(known: Iterable[Target]) -> dict[str, Param]:
    """The parameters that have the matrices of all experts of a layer, by their names."""
    experts = (one.param for one in known if one.param.kind == "experts")
    return {one.other_name: one for one in experts if one.other_name is not None}


def sizes(param: Param, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a parameter's A and B. Rows rank · e … of A are those of expert e; columns of
    all experts take turns in B."""
    num, num_outputs, depth = param.shape
    return {"A": (num * rank, depth), "B": (num_outputs, rank * num)}


def parameter_of(module: str, shapes: Shapes, known: Mapping[str, Param]) -> str | None:
    """The name of the parameter that a module's matrices change; None if there is none. The names
    in a file tell the module alone, so shapes decide."""
    while module.endswith(NESTED):
        module = module.removesuffix(NESTED)
    for name, param in known.items():
        _, num_outputs, depth = param.shape
        sides = shapes.get("A", (0, 0))[1], shapes.get("B", (0, 0))[0]
        if name.rpartition(".")[0] == module and sides == (depth, num_outputs):
            return name
    return None


def fill(
    target: Target,
    rank: int,
    shard: Shard,
    into: tuple[Tensor, Tensor],
    stacked: tuple[Tensor, Tensor] | None,
    of_source: Mapping[int, tuple[Tensor, Tensor]],
) -> None:
    """Put a rank's part of a layer's experts into a [E, L, D] and b [E, O, X]. `stacked` are A and
    B of a parameter, `of_source` those of linear layers; B has its factor."""
    param, (a_ELD, b_EOX) = target.param, into
    num, num_outputs, depth = param.shape
    num_parts = len(param.expert_rows)
    whole_a_ELD = a_ELD.new_zeros(num, num_parts * rank, depth)
    whole_b_EOX = b_EOX.new_zeros(num, num_outputs, rank)
    a_of_part = whole_a_ELD.view(num * num_parts, rank, depth)
    b_of_part = whole_b_EOX.view(num * num_outputs, rank).split(param.parts)
    if stacked is not None:
        a_RD, b_OR = stacked
        a_ERD, b_ORE = a_RD.view(num, -1, depth), b_OR.view(num_outputs, -1, num)
        own = a_ERD.shape[1]
        whole_a_ELD.view(num, num_parts, rank, depth)[:, :, :own] = a_ERD.unsqueeze(1)
        whole_b_EOX[:, :, :own] = b_ORE.permute(2, 0, 1)
    for source_idx, (a_RD, b_OR) in of_source.items():
        a_of_part[source_idx, : len(a_RD)] = a_RD
        b_of_part[source_idx][:, : len(a_RD)] = b_OR
    columns = param._replace(
        shape=whole_a_ELD.shape,
        parts=(rank,) * (num * num_parts),
        shard_axis=1 if param.shard_axis == 1 else None,
    )
    rows = param._replace(shape=whole_b_EOX.shape, shard_axis=0 if param.shard_axis == 0 else None)
    a_ELD.copy_(taken(shard, columns, whole_a_ELD))
    b_EOX.copy_(taken(shard, rows, whole_b_EOX))
