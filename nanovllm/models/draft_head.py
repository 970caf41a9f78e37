"""A head: a small model that drafts tokens from the hidden states of another model.

Its layers have places for each token t of a sequence, as those of the other model have. The entry
at t is made from token t + 1 and the other model's hidden states after t, and predicts token t + 2.
To draft more than one token, the head reads its own hidden state in place of the other model's.

T tokens | R rows | D hidden of the head | I hidden of the other model | J = inputs of a layer
V vocabulary of the other model | X tokens that the head can draft
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.models import dense
from nanovllm.models.config import ModelConfig
from nanovllm.models.formats import Weight
from nanovllm.models.model import Model
from nanovllm.models.param import Param


class Outer(NamedTuple):
    """What regions before a head's layers read of its `Params`."""

    extra: Any
    embed_VD: Weight
    final_norm_D: Tensor


@dataclass(frozen=True, kw_only=True)
class HeadModel(Model):
    """The model of a head. All its regions are pure functions at the top of a module.

    `enter(config, w, token_T, hidden)` gives the input of the first layer [T, J] from the hidden
    states [T, I] of `reads`, the other model's layers. `again(config, w, token_R, h_RD)` gives it
    from the head's own after its last layer. `w` is `Outer`.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (*Model.GRAPH_FIELDS, "enter", "again")

    enter: Callable[..., Tensor]
    again: Callable[..., Tensor]
    reads: tuple[int, ...]


def logits(
    cfg: ModelConfig, final_norm_D: Tensor, head_VD: Weight, target_X: Tensor | None, h_RD: Tensor
) -> Tensor:
    """`dense.head`, as logits [R, V] of the other model's tokens: −inf for those that the head
    cannot draft. `target_X` are the ids of those that it can; None for all."""
    logits_RX = dense.head(cfg, final_norm_D, head_VD, h_RD)
    if target_X is None:
        return logits_RX
    logits_RV = logits_RX.new_full((len(logits_RX), cfg.vocab_size), float("-inf"))
    return logits_RV.index_copy(1, target_X, logits_RX)


def beside(first_TD: Tensor, second_TD: Tensor) -> Tensor:
    """[T, 2D] of two tensors [T, D]."""
    return torch.cat((first_TD, second_TD), dim=-1)


def renamed(param: Param, old: str, new: str) -> Param:
    """A parameter whose tensors begin with another prefix."""
    other = param.other_name
    return param._replace(
        sources=tuple(new + one.removeprefix(old) for one in param.sources),
        other_name=other and new + other.removeprefix(old),
    )
