"""Experts in groups, chosen by the sigmoid or softmax of their scores, beside shared experts.

It is the sparse half of DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash layers. Routers that are the
softmax of all scores alone are in `moe`.

T tokens | K experts per token | E experts | D hidden
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import experts
from nanovllm.models.config import ModelConfig, MoeConfig
from nanovllm.models.dense import mlp_params
from nanovllm.models.experts import Experts
from nanovllm.models.formats import Weight, linear
from nanovllm.models.model import Param
from nanovllm.models.moe import QWEN_NAMES, expert_params


@dataclass(frozen=True)
class GroupedMoeConfig(MoeConfig):
    """`MoeConfig` with the arguments of `ops.topk_grouped`. With `has_bias` the router has a bias
    that takes part in the choice. Raises ValueError for groups that do not fit."""

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        *MoeConfig.GRAPH_FIELDS, "is_sigmoid", "num_groups", "top_groups", "group_scores", "factor",
    )  # fmt: skip

    is_sigmoid: bool = False
    has_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_scores: int = 1
    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"n_group is {self.num_groups}: it must divide the {self.num_experts} experts"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"topk_group is {self.top_groups}: it must be from 1 to n_group, {self.num_groups}"
            )
        each = self.num_experts // self.num_groups
        if self.top_groups < self.num_groups and each < self.group_scores:
            raise ValueError(
                f"n_group is {self.num_groups}, so that a group has {each} of {self.num_experts} "
                f"experts: it must have at least {self.group_scores}"
            )
        if self.top_k > self.top_groups * each:
            raise ValueError(
                f"num_experts_per_tok is {self.top_k}, but the {self.top_groups} groups of a token "
                f"have {self.top_groups * each} experts"
            )
        if self.shared_size < 1:
            raise ValueError("n_shared_experts is 0: it must be at least 1")


class GroupedWeights(Protocol):
    """The weights that `sparse_mlp` reads. The MLP's fields are those of the shared experts."""

    @property
    def mlp_norm_D(self) -> Tensor: ...
    @property
    def router_ED(self) -> Tensor: ...
    @property
    def router_bias_E(self) -> Tensor | None: ...
    @property
    def experts(self) -> Experts: ...
    @property
    def gate_up_GD(self) -> Weight: ...
    @property
    def down_DF(self) -> Weight: ...


# regions -----------------------------------------------------------------------------------------


def sparse_mlp(
    cfg: ModelConfig, w: GroupedWeights, h_TD: Tensor, kv_slot_T: Tensor, num_pad_slots: int
) -> Tensor:
    """The second half of a sparse layer: h + shared experts + chosen experts of the normalised h.

    Tokens whose cache slot is below `num_pad_slots` are padding.
    """
    x_TD, weight_TK, expert_TK = routed(cfg, w, h_TD)
    expert_TK = experts.prepare(expert_TK, w.experts, kv_slot_T, num_pad_slots)
    # on several ranks, parts of all products are summed before h is added
    sum_TD = h_TD if cfg.num_ranks == 1 else None
    inner_TF = ops.silu_mul(linear(x_TD, w.gate_up_GD, None))
    sum_TD = linear(inner_TF, w.down_DF, None, sum_TD)
    sum_TD = experts.apply(x_TD, weight_TK, expert_TK, w.experts, sum_TD)
    return sum_TD if cfg.num_ranks == 1 else ops.all_reduce(sum_TD, h_TD)


def routed(cfg: ModelConfig, w: GroupedWeights, h_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised h, and its experts: their weights and numbers."""
    moe: Any = cfg.moe  # a `GroupedMoeConfig`, of which tracing shows the fields that it may read
    x_TD = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps)
    logits_TE = ops.linear(x_TD, w.router_ED, None)
    weight_TK, expert_TK = ops.topk_grouped(
        logits_TE, w.router_bias_E, moe.top_k, moe.is_sigmoid, moe.normalize, moe.num_groups,
        moe.top_groups, moe.group_scores, moe.factor,
    )  # fmt: skip
    return x_TD, weight_TK, expert_TK


# parameters --------------------------------------------------------------------------------------


def sparse_params(cfg: ModelConfig, layer_idx: int) -> dict[str, Param]:
    """Parameters of a sparse layer's second half without its norm, by the fields of
    `GroupedWeights` and of a form of experts."""
    moe = cfg.moe
    assert isinstance(moe, GroupedMoeConfig)
    gate = f"model.layers.{layer_idx}.mlp.gate."
    declared = {
        "router_ED": Param.one("router", gate + "weight", moe.num_experts, cfg.hidden_size),
        **expert_params(cfg, QWEN_NAMES, layer_idx),
        **mlp_params(cfg, layer_idx, "mlp.shared_experts", moe.shared_size),
    }
    if moe.has_bias:
        # scores differ by less than a large bias is rounded in the model's dtype
        bias = Param.one("bias", gate + "e_score_correction_bias", moe.num_experts)
        declared["router_bias_E"] = bias._replace(dtype=torch.float32)
    return declared
