"""Phi-3, Phi-3.5 and Phi-4: a Llama whose checkpoint joins q, k and v, and gate and up.

Phi-4-mini rotates a part of each head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.model import LayerKind, Model, Param
from nanovllm.models.param import RowOrder
from nanovllm.models.rope import grouped_rows

NAME = "Phi3ForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Phi3Config`."""
    require_type(hf, NAME, "phi3")
    config = dense_config(
        hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, partial_rotary=True
    )
    plain = dense.dense_model(config, (hf.sliding_window or 0,) * hf.num_hidden_layers)
    return replace(plain, layer_params=layer_params)


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """`dense.layer_params`, where one tensor may have all sources of a parameter."""
    declared = dense.layer_params(cfg, kind, layer_idx)
    prefix, rotated = f"model.layers.{layer_idx}.", 2 * len(cfg.inv_freq)
    adapt = GroupedRows(cfg.head_dim, rotated) if rotated < cfg.head_dim else None
    joined = {"qkv_ED": "self_attn.qkv_proj.weight", "gate_up_GD": "mlp.gate_up_proj.weight"}
    for name, source in joined.items():
        declared[name] = declared[name]._replace(other_name=prefix + source)
    declared["qkv_ED"] = declared["qkv_ED"]._replace(adapt=adapt)
    return declared


@dataclass(frozen=True)
class GroupedRows(RowOrder):
    """Puts the rows of queries and keys in the order of `rope.grouped_rows`."""

    head_dim: int
    rotated: int

    def order(self, parts: tuple[int, ...]) -> Tensor:
        order_E = torch.arange(sum(parts))
        heads_NH = order_E[: parts[0] + parts[1]].view(-1, self.head_dim)
        heads_NH.copy_(heads_NH[:, grouped_rows(self.head_dim, self.rotated)])
        return order_E
