"""The table of tokens and the head in an adapter's file.

V rows of the table | D columns | X rank of the slots
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from nanovllm.models.lora.slots import HEAD, OUTSIDE, Target
from nanovllm.models.param import Param
from nanovllm.models.shards import Shard, taken

# The ends of the names of modules, as transformers has them.
MODULES = ("embed_tokens", "embeddings", HEAD.removesuffix(".weight"))
# PEFT writes the base's own weight of such a module beside its matrices; it is not trained.
COPY = ".base_layer.weight"


def hint(module: str, *, has_slots: bool) -> str:
    """What helps for a module without slots, for a message."""
    if has_slots or not module.endswith(MODULES):
        return ""
    return ": the table of tokens and the head need the option lora_embeddings=True"


def shapes_of_copies(known: Collection[Target]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a file may have copies of, by the names of modules."""
    outside = (one.param for one in known if one.layer_idx == OUTSIDE)
    return {one.sources[0].removesuffix(".weight"): one.shape for one in outside}


def fill(
    target: Target, shard: Shard, into: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]
) -> None:
    """Put a rank's part of the table into a [V, X] and b [D, X]. `given` are A [rank, all rows] and
    B [D, rank], with its factor."""
    (a_VX, b_DX), (a_RV, b_DR), param = into, given, target.param
    rank = len(a_RV)
    whole_VX = a_VX.new_zeros((param.shape[0], a_VX.shape[1]), dtype=torch.float32)
    whole_VX[:, :rank] = a_RV.t()
    own_VX = taken(shard, _of_rank(param, a_VX.shape[1]), whole_VX)
    if param.adapt is not None:
        param.adapt(own_VX, param.local(shard.size).parts)
    a_VX.copy_(own_VX)
    b_DX[:, :rank] = b_DR


def _of_rank(param: Param, rank: int) -> Param:
    """The parameter with so many columns."""
    return param._replace(shape=(param.shape[0], rank))
