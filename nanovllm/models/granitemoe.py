"""Granite 3 with experts: a Granite whose layers have experts in place of the MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.config import ModelConfig, MoeConfig, dense_config, require_type
from nanovllm.models.granite import with_factors
from nanovllm.models.model import LayerKind, Model, Param
from nanovllm.models.moe import ExpertNames, moe_model

NAME = "GraniteMoeForCausalLM"
NAMES = ExpertNames(
    router="block_sparse_moe.router.layer.weight",
    other_router="block_sparse_moe.router.weight",
    one="block_sparse_moe.experts.{expert}.{matrix}.weight",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    stacked=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    shared="shared_mlp",
    shared_gate=None,
)


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `GraniteMoeConfig`."""
    require_type(hf, NAME, "granitemoe")
    return granite_moe(hf, 0, architecture=NAME, dtype=dtype, max_model_len=max_model_len)


def granite_moe(hf: Any, shared_size: int, **fields: Any) -> Model:
    """A Granite with experts. `fields` are those of `dense_config`."""
    config = dense_config(
        hf,
        **fields,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        moe=MoeConfig(
            num_experts=hf.num_local_experts,
            top_k=hf.num_experts_per_tok,
            expert_size=hf.intermediate_size,
            normalize=True,
            shared_size=shared_size,
        ),
    )
    plain = moe_model(config, NAMES, (True,) * hf.num_hidden_layers)
    return with_factors(replace(plain, layer_params=layer_params), hf)


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer. A shared expert is two tensors: gate and up, and down."""
    declared, prefix = NAMES.layer_params(cfg, kind, layer_idx), f"model.layers.{layer_idx}."
    if "down_DF" in declared:
        joined, down = (f"{prefix}shared_mlp.{name}_linear.weight" for name in ("input", "output"))
        declared["gate_up_GD"] = declared["gate_up_GD"]._replace(other_name=joined)
        declared["down_DF"] = declared["down_DF"]._replace(sources=(down,))
    return declared
