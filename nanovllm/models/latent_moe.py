"""The decoder with latent attention and grouped experts: DeepSeek-V2, DeepSeek-V3, GLM-4.7-Flash.

The letters of shapes are those of `latent` and `grouped_moe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.models import dense, experts, grouped_moe, latent
from nanovllm.models.config import ModelConfig, dense_config
from nanovllm.models.experts import Experts
from nanovllm.models.formats import Weight
from nanovllm.models.grouped_moe import GroupedMoeConfig
from nanovllm.models.latent import LatentConfig, LatentSizes
from nanovllm.models.model import Batch, LatentCache, LayerCall, LayerKind, Model, Param


class DenseLayer(NamedTuple):
    """Weights of one decoder layer with an MLP."""

    attn_norm_D: Tensor
    first_ED: Weight
    first_bias_E: Tensor | None
    q_norm_A: Tensor | None
    q_up_QA: Weight | None
    kv_norm_L: Tensor
    kv_up_XL: Tensor
    out_DQ: Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    gate_up_GD: Weight
    gate_up_bias_G: Tensor | None
    down_DF: Weight
    down_bias_D: Tensor | None


class SparseLayer(NamedTuple):
    """Weights of one decoder layer with experts. The MLP's fields are those of shared experts."""

    attn_norm_D: Tensor
    first_ED: Weight
    first_bias_E: Tensor | None
    q_norm_A: Tensor | None
    q_up_QA: Weight | None
    kv_norm_L: Tensor
    kv_up_XL: Tensor
    out_DQ: Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    router_ED: Tensor
    router_bias_E: Tensor | None
    experts: Experts
    gate_up_GD: Weight
    down_DF: Weight


def latent_config(
    hf: Any,
    *,
    architecture: str,
    dtype: torch.dtype,
    max_model_len: int | None,
    moe: GroupedMoeConfig,
) -> LatentConfig:
    """The config of an architecture of this decoder, from transformers' config. Raises ValueError
    for settings that this engine does not support."""
    if hf.num_key_value_heads != hf.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads is {hf.num_key_value_heads}, but all heads have their own keys: "
            f"it must be num_attention_heads, {hf.num_attention_heads}"
        )
    if hf.head_dim != hf.qk_rope_head_dim:
        raise ValueError(
            f"head_dim is {hf.head_dim}: it must be qk_rope_head_dim, {hf.qk_rope_head_dim}"
        )
    has_bias, rank = bool(hf.attention_bias), hf.q_lora_rank
    if has_bias and rank is None:
        raise ValueError("attention_bias True is not supported with q_lora_rank null")
    if rank is not None and rank < 1:
        raise ValueError(f"q_lora_rank is {rank}: it must be null or at least 1")
    config = dense_config(
        hf,
        architecture=architecture,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=has_bias,
        out_bias=has_bias,
    )
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    sizes = LatentSizes(
        latent=hf.kv_lora_rank,
        rotated=hf.qk_rope_head_dim,
        plain=hf.qk_nope_head_dim,
        value=hf.v_head_dim,
        queries=rank or 0,
        scale=latent.attention_scale(hf, hf.qk_nope_head_dim + hf.qk_rope_head_dim),
        is_interleaved=getattr(hf, "rope_interleave", True),
    )
    return LatentConfig(**{**values, "head_dim": sizes.rotated, "moe": moe}, latent=sizes)


def latent_model(cfg: LatentConfig, is_sparse: Sequence[bool], num_predicting: int) -> Model:
    """The model of a config; `is_sparse` has an entry for each layer.

    The `num_predicting` layers after the last predict further tokens (DeepSeek-V3's MTP). They are
    not read.
    """
    keeps, first = latent.paged_latent(cfg), cfg.num_layers
    kinds = [LayerKind("sparse" if sparse else "dense", keeps, sparse) for sparse in is_sparse]
    return Model(
        config=cfg,
        layer_kinds=tuple(kinds),
        embed=dense.embed,
        layer=layer,
        head=dense.head,
        outer_params=dense.outer_params,
        layer_params=layer_params,
        layer_type=layer_type,
        read_elsewhere=tuple(f"model.layers.{first + i}." for i in range(num_predicting)),
    )


def sparse_from(hf: Any, num_dense: int) -> tuple[bool, ...]:
    """For each layer, whether it has experts: all but the first `num_dense`. Raises ValueError for
    another number of layers, or another `moe_layer_freq`, than is supported."""
    if not 0 <= num_dense <= hf.num_hidden_layers:
        raise ValueError(
            f"first_k_dense_replace is {num_dense}: it must be from 0 to num_hidden_layers, "
            f"{hf.num_hidden_layers}"
        )
    if (step := getattr(hf, "moe_layer_freq", 1)) != 1:
        raise ValueError(f"moe_layer_freq {step!r} is not supported: only 1 is")
    return tuple(layer_idx >= num_dense for layer_idx in range(hf.num_hidden_layers))


def num_predicting(hf: Any) -> int:
    """The number of layers that predict further tokens. Raises ValueError for another value than a
    small number."""
    num = getattr(hf, "num_nextn_predict_layers", None) or 0
    if not 0 <= num <= hf.num_hidden_layers:
        raise ValueError(
            f"num_nextn_predict_layers is {num}: it must be from 0 to num_hidden_layers, "
            f"{hf.num_hidden_layers}"
        )
    return num


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: LatentConfig,
    call: LayerCall,
    w: DenseLayer | SparseLayer,
    kv: LatentCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer, dense or sparse: see `dense.layer`."""
    num_pad_slots = kv.shape_CB[1]  # padding writes to block 0
    if call.predicts and batch.keep_R is None and isinstance(w, SparseLayer):
        _, _, expert_TK = grouped_moe.routed(cfg, w, h_TD)
        experts.prepare(expert_TK, w.experts, batch.slot_T, num_pad_slots, ahead=True)
    h_TD = latent.attention(cfg, call, w, kv, cos_sin_MH, batch, h_TD)
    if isinstance(w, DenseLayer):
        return dense.mlp(cfg, w, h_TD)
    kv_slot_T = batch.slot_T
    if batch.keep_R is not None:
        kv_slot_T = kv_slot_T.index_select(0, batch.keep_R)
    return grouped_moe.sparse_mlp(cfg, w, h_TD, kv_slot_T, num_pad_slots)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[DenseLayer] | type[SparseLayer]:
    return SparseLayer if kind.sparse else DenseLayer


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `layer_type(kind)`."""
    assert isinstance(cfg, LatentConfig)
    second = grouped_moe.sparse_params if kind.sparse else dense.mlp_params
    return {**latent.attention_params(cfg, layer_idx), **second(cfg, layer_idx)}
