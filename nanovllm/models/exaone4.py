"""EXAONE 4: norms after attention and MLP, windows, and no rotation in layers without a window.

The letters of shapes are those of `dense`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, dense_config, require_type, windows_by_layer_type
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_ropes import with_still_layers
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param

NAME = "Exaone4ForCausalLM"
NORMS = {"attn_norm_D": "post_attention_layernorm", "mlp_norm_D": "post_feedforward_layernorm"}


class Exaone4Layer(NamedTuple):
    """Weights of one decoder layer. The norms follow attention and MLP."""

    qkv_ED: Weight
    q_norm_H: Tensor
    k_norm_H: Tensor
    out_DQ: Weight
    attn_norm_D: Tensor
    gate_up_GD: Weight
    down_DF: Weight
    mlp_norm_D: Tensor


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Exaone4Config`.

    If the config has a window, layers without one rotate nothing. The input of a layer's first
    product is not normalised, so values have no bound for an fp8 cache.
    """
    require_type(hf, NAME, "exaone4")
    config = dense_config(
        hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len, qk_norm=True
    )
    windows = windows_by_layer_type(hf)
    rotates_all = hf.sliding_window is None
    config, ropes = with_still_layers(config, [rotates_all or bool(one) for one in windows])
    return replace(
        dense.dense_model(config, windows, ropes),
        layer=layer,
        layer_params=layer_params,
        layer_type=layer_type,
        kv_scales=None,
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: Exaone4Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    q_TNH, k_TKH, v_TKH = dense.heads(cfg, linear(h_TD, w.qkv_ED, None))
    q_TNH = ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps)
    k_TKH = ops.rms_norm(k_TKH, w.k_norm_H, cfg.norm_eps)
    o_TQ = dense.attend(cfg, call, kv, cos_sin_MH, batch, (q_TNH, k_TKH, v_TKH))
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    a_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, None, None)
    h_TD = h_TD + ops.rms_norm(a_TD, w.attn_norm_D, cfg.norm_eps)
    inner_TF = ops.silu_mul(linear(h_TD, w.gate_up_GD, None))
    m_TD = dense.summed_linear(cfg, inner_TF, w.down_DF, None, None)
    return h_TD + ops.rms_norm(m_TD, w.mlp_norm_D, cfg.norm_eps)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[Exaone4Layer]:
    return Exaone4Layer


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `Exaone4Layer`."""
    declared, prefix = dense.layer_params(cfg, kind, layer_idx), f"model.layers.{layer_idx}."
    for name, source in NORMS.items():
        declared[name] = Param.one("norm", f"{prefix}{source}.weight", cfg.hidden_size)
    return declared
