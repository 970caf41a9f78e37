"""A router that chooses experts by a score plus a bias, within the best groups of experts.

DeepSeek-V3, GLM-4.5 and ERNIE 4.5 choose so, and DeepSeek-V2 without a bias. The bias, which
balances the load, counts for the choice alone, and the weights are the scores themselves. Products
and scores are in fp32, whatever the model's dtype is, since small differences choose other experts.

T tokens | K experts per token | E experts | D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.param import Param

Scoring = Literal["sigmoid", "softmax"]
SMALLEST_SUM = 1e-20
# Fields of configs whose values families pass on.
READ = frozenset(
    {"n_group", "n_groups", "topk_group", "num_expert_group", "routed_scaling_factor",
     "route_scale", "router_scaling_factor"}
)  # fmt: skip


@dataclass(frozen=True)
class GroupRouter:
    """How experts are chosen: see `reference.experts.group_topk`. With one of `group_scores` a
    group is worth its best expert, as in DeepSeek-V2.

    Raises ValueError for groups that do not fit.
    """

    scoring: Scoring = "sigmoid"
    num_groups: int = 1
    top_groups: int = 1
    group_scores: int = 2
    scale: float = 1.0
    smallest_sum: float = SMALLEST_SUM

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError for numbers of experts that the groups do not fit."""
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(f"n_group is {self.num_groups}: it must divide {num_experts} experts")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"topk_group is {self.top_groups}: it must be from 1 to n_group {self.num_groups}"
            )
        each = num_experts // self.num_groups
        if self.top_groups < self.num_groups and each < self.group_scores:
            raise ValueError(
                f"n_group is {self.num_groups}, so that a group has {each} of {num_experts} "
                f"experts: it must have at least {self.group_scores}"
            )
        in_groups = self.top_groups * each
        if top_k > in_groups:
            raise ValueError(
                f"num_experts_per_tok is {top_k}, but {self.top_groups} of {self.num_groups} "
                f"groups have {in_groups} experts"
            )

    def fields(self, others: Mapping[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
        """Fields of configs for routers, and the values that this one computes. `others` are all
        fields, with the values of plain routers."""
        scoring: tuple[object, ...] = (self.scoring,)
        own = dict.fromkeys(("scoring_func", "score_func", "score_function"), scoring)
        unread = {name: allowed for name, allowed in others.items() if name not in READ}
        by_one, by_sum = ("greedy", "group_limited_greedy"), ("noaux_tc",)
        return {**unread, **own, "topk_method": by_one if self.group_scores == 1 else by_sum}


def choose(
    router: GroupRouter,
    top_k: int,
    normalize: bool,
    x_TD: Tensor,
    weights: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """The experts of each token: weights [T, K] fp32 and numbers int32. `weights` are the router's
    matrix and bias, both in fp32 (`router_params`)."""
    router_ED, bias_E = weights
    logits_TE = torch.nn.functional.linear(x_TD.float(), router_ED)
    return ops.group_topk(  # type: ignore[no-any-return]
        logits_TE, bias_E, top_k, router.num_groups, router.top_groups, router.group_scores,
        router.scoring == "sigmoid", normalize, router.smallest_sum, router.scale,
    )  # fmt: skip


def router_params(weight: str, bias: str | None, num_experts: int, hidden: int) -> dict[str, Param]:
    """The parameters of a layer's router, by the fields of `moe.SparseWeights`."""
    declared = {"router_ED": Param.one("router", weight, num_experts, hidden)}
    if bias is not None:
        declared["router_bias_E"] = Param.one("bias", bias, num_experts)
    return {name: param._replace(dtype=torch.float32) for name, param in declared.items()}
