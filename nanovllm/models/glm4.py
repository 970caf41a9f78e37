"""GLM-4 (0414): norms before and after attention and MLP, and half of each head is rotated, in
neighbouring pairs. The letters of shapes are those of `dense`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.formats import Weight, linear
from nanovllm.models.head_order import rotated_as_ops_do
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param

NAME = "Glm4ForCausalLM"
NORMS = {"after_attn_norm_D": "post_self_attn_layernorm", "after_mlp_norm_D": "post_mlp_layernorm"}


class Glm4Layer(NamedTuple):
    """Weights of one decoder layer."""

    attn_norm_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    q_norm_H: None
    k_norm_H: None
    out_DQ: Weight
    out_bias_D: None
    after_attn_norm_D: Tensor
    mlp_norm_D: Tensor
    gate_up_GD: Weight
    down_DF: Weight
    after_mlp_norm_D: Tensor


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Glm4Config`."""
    require_type(hf, NAME, "glm4")
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        partial_rotary=True,
        qkv_bias=hf.attention_bias,
    )
    return replace(
        dense.dense_model(config), layer=layer, layer_params=layer_params, layer_type=layer_type
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: Glm4Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    qkv = dense.heads(cfg, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    o_TQ = dense.attend(cfg, call, kv, cos_sin_MH, batch, qkv)
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    a_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, None, None)
    h_TD = h_TD + ops.rms_norm(a_TD, w.after_attn_norm_D, cfg.norm_eps)
    x_TD = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps)
    inner_TF = ops.silu_mul(linear(x_TD, w.gate_up_GD, None))
    m_TD = dense.summed_linear(cfg, inner_TF, w.down_DF, None, None)
    return h_TD + ops.rms_norm(m_TD, w.after_mlp_norm_D, cfg.norm_eps)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[Glm4Layer]:
    return Glm4Layer


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `Glm4Layer`."""
    declared, prefix = dense.layer_params(cfg, kind, layer_idx), f"model.layers.{layer_idx}."
    for name, source in NORMS.items():
        declared[name] = Param.one("norm", f"{prefix}{source}.weight", cfg.hidden_size)
    joined = prefix + "mlp.gate_up_proj.weight"
    declared["gate_up_GD"] = declared["gate_up_GD"]._replace(other_name=joined)
    return rotated_as_ops_do(cfg, declared, interleaved=True)
