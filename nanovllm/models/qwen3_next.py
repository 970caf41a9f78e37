"""Qwen3-Next (80B-A3B): a hybrid decoder with experts, whose checkpoint has the inputs of the delta
rule key head by key head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.models.config import ModelConfig, MoeConfig, dense_config, require_type
from nanovllm.models.hybrid import DeltaRule, HybridNames, hybrid_model
from nanovllm.models.layer_plan import sparse_by_step
from nanovllm.models.model import Model, Param
from nanovllm.models.param import RowOrder

NAME = "Qwen3NextForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Qwen3NextConfig`."""
    require_type(hf, NAME, "qwen3_next")
    is_sparse = sparse_by_step(hf) if hf.num_experts else (False,) * hf.num_hidden_layers
    moe = moe_config(hf, normalize=hf.norm_topk_prob) if hf.num_experts else None
    config = text_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, moe=moe)
    return hybrid_model(config, delta_rule(hf), NAMES, hf.layer_types, is_sparse)


def moe_config(hf: Any, *, normalize: bool) -> MoeConfig:
    """The experts of a config, one of which all tokens share."""
    return MoeConfig(
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        expert_size=hf.moe_intermediate_size,
        normalize=normalize,
        shared_size=hf.shared_expert_intermediate_size,
    )


def text_config(hf: Any, **fields: Any) -> ModelConfig:
    """The config of the attention layers; `fields` are those of `dense_config`."""
    bias = hf.attention_bias
    return dense_config(
        hf, partial_rotary=True, qkv_bias=bias, out_bias=bias, qk_norm=True, **fields
    )


def delta_rule(hf: Any) -> DeltaRule:
    return DeltaRule(
        num_key_heads=hf.linear_num_key_heads,
        num_value_heads=hf.linear_num_value_heads,
        key_size=hf.linear_key_head_dim,
        value_size=hf.linear_value_head_dim,
        num_taps=hf.linear_conv_kernel_dim,
    )


@dataclass(frozen=True)
class ByPart(RowOrder):
    """Puts rows that are in `sizes` parts for each key head in the order of these parts."""

    sizes: tuple[int, ...]

    def order(self, parts: tuple[int, ...]) -> Tensor:
        (num_rows,) = parts
        of_heads = torch.arange(num_rows).view(-1, sum(self.sizes))
        return torch.cat([part.flatten() for part in of_heads.split(self.sizes, dim=1)])


def inputs(delta: DeltaRule, hidden: int, prefix: str) -> dict[str, Param]:
    """[q | k | v | z], and [b | a]."""
    repeats = delta.num_value_heads // delta.num_key_heads
    values = repeats * delta.value_size

    def one(name: str, *sizes: int) -> Param:
        num_rows = delta.num_key_heads * sum(sizes)
        param = Param.one("linear", prefix + name, num_rows, hidden, shard_axis=0)
        return param._replace(units=(delta.num_key_heads,), adapt=ByPart(sizes))

    return {
        "channels_ED": one("in_proj_qkvz.weight", delta.key_size, delta.key_size, values, values),
        "gates_JD": one("in_proj_ba.weight", repeats, repeats),
    }


NAMES = HybridNames(inputs)
