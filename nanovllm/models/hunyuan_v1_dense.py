"""Hunyuan (dense): queries and keys are normalised after they are rotated, and the rotation's base
may be stretched by a fixed factor α. The letters of shapes are those of `dense`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.formats import linear
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param
from nanovllm.models.scaled import check_factor

NAME = "HunYuanDenseV1ForCausalLM"
NORMS = {"q_norm_H": "query_layernorm", "k_norm_H": "key_layernorm"}


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `HunYuanDenseV1Config`."""
    require_type(hf, NAME, "hunyuan_v1_dense")
    return hunyuan_model(
        dense.dense_model(
            dense_config(
                with_stretched_base(hf),
                architecture=NAME,
                dtype=dtype,
                max_model_len=max_model_len,
                qkv_bias=hf.attention_bias,
                out_bias=hf.attention_bias,
                qk_norm=True,
            )
        )
    )


def hunyuan_model(plain: Model) -> Model:
    """A dense model with the attention of this family."""
    return replace(plain, layer=layer, layer_params=layer_params, kv_scales=kv_scales)


def with_stretched_base(hf: Any) -> Any:
    """The config whose base is θ · α^(H / (H − 2)), if it has an α. Such checkpoints name the rope
    type "dynamic", but no frequency depends on a length."""
    parameters = hf.rope_parameters
    alpha, rope_type = parameters.get("alpha"), parameters.get("rope_type", parameters.get("type"))
    if not alpha or rope_type != "dynamic":
        return hf
    for name in ("alpha", "rope_theta"):
        check_factor(name, parameters.get(name))
    size = hf.head_dim or hf.hidden_size // hf.num_attention_heads
    stretched = copy.copy(hf)
    base = parameters["rope_theta"] * alpha ** (size / (size - 2))
    stretched.rope_parameters = {"rope_type": "default", "rope_theta": base}
    return stretched


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: dense.Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    return dense.mlp(cfg, w, attention(cfg, call, w, kv, cos_sin_MH, batch, h_TD))


def attention(
    cfg: ModelConfig,
    call: LayerCall,
    w: dense.AttentionWeights,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """The first half of a layer: see `dense.attention`."""
    assert w.q_norm_H is not None and w.k_norm_H is not None
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    q_TNH, k_TKH, v_TKH = dense.heads(cfg, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    q_TNH, k_TKH = dense.rotate(cos_sin_MH, batch, q_TNH, k_TKH)
    q_TNH = ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps)
    k_TKH = ops.rms_norm(k_TKH, w.k_norm_H, cfg.norm_eps)
    o_TQ = dense.attend_rotated(cfg, call, kv, batch, (q_TNH, k_TKH, v_TKH))
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    return dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, h_TD)


def kv_scales(cfg: ModelConfig, w: dense.AttentionWeights) -> tuple[Tensor, Tensor]:
    """`dense.kv_scales`; the norm after the rotation undoes a factor of the rotary table."""
    return dense.kv_scales(replace(cfg, rope_scale=1.0), w)


# parameters --------------------------------------------------------------------------------------


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """`dense.layer_params`, with this family's names of norms."""
    return named(dense.layer_params(cfg, kind, layer_idx), layer_idx)


def named(declared: dict[str, Param], layer_idx: int) -> dict[str, Param]:
    """A layer's parameters, with this family's names of the norms of queries and keys."""
    prefix = f"model.layers.{layer_idx}.self_attn."
    return declared | {
        name: declared[name]._replace(sources=(f"{prefix}{source}.weight",))
        for name, source in NORMS.items()
    }
