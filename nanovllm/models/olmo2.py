"""OLMo-2: norms after attention and MLP, and one norm over the queries, or keys, of all heads.

The letters of shapes are those of `dense`.
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
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param

NAME = "Olmo2ForCausalLM"


class Olmo2Layer(NamedTuple):
    """Weights of one decoder layer. The norms follow attention and MLP."""

    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    q_norm_Q: Tensor
    k_norm_J: Tensor
    out_DQ: Weight
    out_bias_D: Tensor | None
    attn_norm_D: Tensor
    gate_up_GD: Weight
    down_DF: Weight
    mlp_norm_D: Tensor


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Olmo2Config`."""
    require_type(hf, NAME, "olmo2")
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
    )
    return olmo_model(dense.dense_model(config))


def olmo_model(plain: Model) -> Model:
    """A dense model with the norms of this family.

    The input of a layer's first product is not normalised, so values have no bound for an fp8
    cache.
    """
    return replace(
        plain, layer=layer, layer_params=layer_params, layer_type=layer_type, kv_scales=None
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: Olmo2Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    q_TNH, k_TKH, v_TKH = dense.heads(cfg, linear(h_TD, w.qkv_ED, w.qkv_bias_E))
    q_TNH, k_TKH = norm_of_all(cfg, q_TNH, w.q_norm_Q), norm_of_all(cfg, k_TKH, w.k_norm_J)
    o_TQ = dense.attend(cfg, call, kv, cos_sin_MH, batch, (q_TNH, k_TKH, v_TKH))
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    a_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, None)
    h_TD = h_TD + ops.rms_norm(a_TD, w.attn_norm_D, cfg.norm_eps)
    inner_TF = ops.silu_mul(linear(h_TD, w.gate_up_GD, None))
    m_TD = dense.summed_linear(cfg, inner_TF, w.down_DF, None, None)
    return h_TD + ops.rms_norm(m_TD, w.mlp_norm_D, cfg.norm_eps)


def norm_of_all(cfg: ModelConfig, x_TNH: Tensor, weight_Q: Tensor) -> Tensor:
    """The norm over all heads together, those of other ranks included.

    Each rank has equally many heads, so the mean over all is the mean of the ranks' means.
    """
    x_TQ = x_TNH.flatten(1)
    if cfg.num_ranks == 1:
        return ops.rms_norm(x_TQ, weight_Q, cfg.norm_eps).view(x_TNH.shape)
    x32_TQ = x_TQ.float()
    mean_T1 = ops.all_reduce(x32_TQ.square().mean(-1, keepdim=True)) / cfg.num_ranks
    normed_TQ = x32_TQ * torch.rsqrt(mean_T1 + cfg.norm_eps)
    return (normed_TQ.to(x_TNH.dtype) * weight_Q).view(x_TNH.shape)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[Olmo2Layer]:
    return Olmo2Layer


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `Olmo2Layer`."""
    declared = dense.layer_params(cfg, kind, layer_idx)
    prefix = f"model.layers.{layer_idx}."
    norms = {"attn_norm_D": "post_attention_layernorm", "mlp_norm_D": "post_feedforward_layernorm"}
    for name, source in norms.items():
        declared[name] = Param.one("norm", f"{prefix}{source}.weight", cfg.hidden_size)
    of_heads = {"q_norm_Q": ("q", cfg.num_heads), "k_norm_J": ("k", cfg.num_kv_heads)}
    for name, (which, num) in of_heads.items():
        source = f"{prefix}self_attn.{which}_norm.weight"
        param = Param.one("norm", source, num * cfg.head_dim, shard_axis=0)
        declared[name] = param._replace(units=(num,))
    return declared
