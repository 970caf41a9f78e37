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

from nanovllm.kernels import ops
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.config import ModelConfig
from nanovllm.models.formats import Weight, linear
from nanovllm.models.model import LayerCache, Model
from nanovllm.models.param import Param

HEAD, TARGETS = "lm_head.weight", "d2t"  # tensors of heads that draft some tokens of the vocabulary


class Outer(NamedTuple):
    """What regions before a head's layers read of its `Params`."""

    extra: Any
    embed_VD: Weight
    final_norm_D: Tensor


@dataclass(frozen=True, kw_only=True)
class HeadModel(Model):
    """The model of a head. All its regions are pure functions at the top of a module.

    `enter(config, w, token_T, states_TJ)` gives the input of the first layer [T, J] from the hidden
    states [I] of `reads`, the other model's layers, beside each other. `again(config, w, token_R,
    h_RD)` gives it from the head's own after its last layer. `w` is `Outer`.

    `store(config, layer's weights, kv, cos_sin_MH, place, x_TJ)`, if there is one, only writes what
    the layer keeps, for steps after which nothing is drafted. `place` is that of `store_context`.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (*Model.GRAPH_FIELDS, "enter", "again", "store")

    enter: Callable[..., Tensor]
    again: Callable[..., Tensor]
    store: Callable[..., tuple[()]] | None = None
    reads: tuple[int, ...]


def store_context(
    cfg: ModelConfig,
    w: Any,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    place: tuple[Tensor, Tensor],
    x_TD: Tensor,
) -> tuple[()]:
    """Write the keys and values that a layer, with plain weights, makes of its normalised inputs,
    at `place`: rope_pos_T and slot_T."""
    rope_pos_T, slot_T = place
    first, num = cfg.num_heads * cfg.head_dim, 2 * cfg.num_kv_heads * cfg.head_dim
    bias_E = None if w.qkv_bias_E is None else w.qkv_bias_E.narrow(0, first, num)
    kv_TE = linear(x_TD, w.qkv_ED.narrow(0, first, num), bias_E)
    cache = kv.k_CBKH, kv.v_CBKH
    scales = kv.k_scale_K, kv.v_scale_K
    norms, places = (None, w.k_norm_H), (cos_sin_MH, rope_pos_T, slot_T)
    ops.qk_norm_rope_store(kv_TE, *norms, *places, *cache, 0, cfg.norm_eps, *scales)  # no queries
    return ()


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


@dataclass(frozen=True)
class Targets:
    """Turns differences (a token's id in the model − its number in the head) into the ids. Raises
    CheckpointError for ids that the model does not have."""

    vocab_size: int

    def __call__(self, diff_X: Tensor, parts: tuple[int, ...]) -> None:
        diff_X.add_(torch.arange(len(diff_X), device=diff_X.device))
        least, most = int(diff_X.min()), int(diff_X.max())
        if least < 0 or most >= self.vocab_size:
            raise CheckpointError(
                f"the tensor {TARGETS} maps to tokens from {least} to {most}: the model has those "
                f"from 0 to {self.vocab_size - 1}"
            )


def target_param(cfg: ModelConfig, num: int) -> Param:
    """The model's ids of the `num` tokens that a head can draft."""
    param = Param.one("bias", TARGETS, num)._replace(dtype=torch.int64)
    return param._replace(adapt=Targets(cfg.vocab_size))
