"""Puts the rows of queries and keys in the order in which the ops rotate them.

Checkpoints differ in which elements of a head turn together, and in how many do (see
`rope.grouped_rows`). The order is folded into the weights, so the programs are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.models.config import ModelConfig
from nanovllm.models.param import Param, RowOrder
from nanovllm.models.rope import grouped_rows

# Parameters with an element for each row of heads, and how many of their sources, from the first,
# are rotated: of packed projections queries and keys.
ROTATED = {"qkv_ED": 2, "qkv_bias_E": 2, "q_norm_H": 1, "k_norm_H": 1}


@dataclass(frozen=True)
class HeadOrder(RowOrder):
    """Puts the rows of each head of the first `num_sources` sources in the order `row_H`."""

    row_H: tuple[int, ...]
    num_sources: int

    def order(self, parts: tuple[int, ...]) -> Tensor:
        order_E = torch.arange(sum(parts))
        heads_NH = order_E[: sum(parts[: self.num_sources])].view(-1, len(self.row_H))
        heads_NH.copy_(heads_NH[:, self.row_H])
        return order_E


def rotated_as_ops_do(
    cfg: ModelConfig, declared: dict[str, Param], *, interleaved: bool = False
) -> dict[str, Param]:
    """A layer's parameters, with the heads of a checkpoint that rotates its first elements.

    The number of rotated elements is that of the config's frequencies.
    """
    rotated = 2 * len(cfg.inv_freq)
    if rotated == cfg.head_dim and not interleaved:
        return declared
    row_H = grouped_rows(cfg.head_dim, rotated, interleaved=interleaved)
    return {
        name: param._replace(adapt=HeadOrder(row_H, ROTATED[name])) if name in ROTATED else param
        for name, param in declared.items()
    }
