"""StarCoder2: layer norms with biases, and an MLP without a gate.

The letters of shapes are those of `dense`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models import kv_scales as bounds
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.formats import Weight, linear, rows
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param
from nanovllm.models.scaled import check_factor

NAME = "Starcoder2ForCausalLM"


class Starcoder2Layer(NamedTuple):
    """Weights of one decoder layer."""

    attn_norm_D: Tensor
    attn_norm_bias_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    out_DQ: Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    mlp_norm_bias_D: Tensor
    up_FD: Weight
    up_bias_F: Tensor | None
    down_DF: Weight
    down_bias_D: Tensor | None


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Starcoder2Config`."""
    require_type(hf, NAME, "starcoder2")
    check_factor("norm_epsilon", hf.norm_epsilon)
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        hidden_act="gelu_pytorch_tanh",
        norm_eps=hf.norm_epsilon,
        qkv_bias=hf.use_bias,
        out_bias=hf.use_bias,
        mlp_bias=hf.use_bias,
    )
    return replace(
        dense.dense_model(config, (hf.sliding_window or 0,) * hf.num_hidden_layers),
        layer=layer,
        head=head,
        outer_params=outer_params,
        layer_params=layer_params,
        layer_type=layer_type,
        kv_scales=kv_scales,
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: Starcoder2Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    x_TD = ops.layer_norm(h_TD, w.attn_norm_D, w.attn_norm_bias_D, cfg.norm_eps)
    qkv = dense.heads(cfg, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    o_TQ = dense.attend(cfg, call, kv, cos_sin_MH, batch, qkv)
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    h_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, h_TD)
    x_TD = ops.layer_norm(h_TD, w.mlp_norm_D, w.mlp_norm_bias_D, cfg.norm_eps)
    up_TF = linear(x_TD, w.up_FD, w.up_bias_F)
    inner_TF = torch.nn.functional.gelu(up_TF, approximate="tanh")
    return dense.summed_linear(cfg, inner_TF, w.down_DF, w.down_bias_D, h_TD)


def head(cfg: ModelConfig, final_norm_D: Tensor, head_VD: Weight, h_RD: Tensor) -> Tensor:
    """`dense.head` with a layer norm: `final_norm_D` is its weight, then its bias."""
    weight_D, bias_D = final_norm_D.chunk(2)
    return linear(ops.layer_norm(h_RD, weight_D, bias_D, cfg.norm_eps), head_VD, None)


def kv_scales(cfg: ModelConfig, w: Starcoder2Layer) -> tuple[Tensor, Tensor]:
    """See `dense.kv_scales`. The product with the norm's bias is a part of the projection's."""
    bias_E = rows(w.qkv_ED, 0) @ w.attn_norm_bias_D.float()
    bias_E = bias_E if w.qkv_bias_E is None else bias_E + w.qkv_bias_E.float()
    return bounds.kv_scales(cfg, w.attn_norm_D, w.qkv_ED, bias_E, None)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[Starcoder2Layer]:
    return Starcoder2Layer


def outer_params(cfg: ModelConfig) -> dict[str, Param]:
    """`dense.outer_params`; the final norm is its weight, then its bias."""
    norm = ("model.norm.weight", "model.norm.bias")
    both = Param.stack("norm", norm, (cfg.hidden_size, cfg.hidden_size))
    return dense.outer_params(cfg) | {"final_norm_D": both._replace(shard_axis=None)}


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `Starcoder2Layer`."""
    declared, prefix = dense.attention_params(cfg, layer_idx), f"model.layers.{layer_idx}."
    hidden, ffn = cfg.hidden_size, cfg.ffn_size
    norms = {"attn_norm_bias_D": "input_layernorm", "mlp_norm_bias_D": "post_attention_layernorm"}
    for name, source in norms.items():
        declared[name] = Param.one("bias", f"{prefix}{source}.bias", hidden)
    up, down = f"{prefix}mlp.c_fc", f"{prefix}mlp.c_proj"
    declared["up_FD"] = Param.one("linear", up + ".weight", ffn, hidden, shard_axis=0)
    declared["down_DF"] = Param.one("linear", down + ".weight", hidden, ffn, shard_axis=1)
    if cfg.mlp_bias:
        declared["up_bias_F"] = Param.one("bias", up + ".bias", ffn, shard_axis=0)
        bias = Param.one("bias", down + ".bias", hidden)
        declared["down_bias_D"] = bias._replace(is_first_only=True)
    return declared
